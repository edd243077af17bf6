"""The disk tier: what was written is found again, by the next worker too, and a bad disk costs nobody anything."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cache_store.codecs import INT8, LADDER
from cache_store.disk_files import BlockFiles
from cache_store.disk_tier import DiskTier, open_disk_tier
from cache_store.frame import HEADER_BYTES, Framer
from cache_store.ids import BlockHash
from cache_store.layout import KVLayout
from cache_store.store import DELETIONS_KNOWN_S, Encoding, Fetch, Fetched, Store

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=64, block_tokens=256, dtype="float32")  # 512 KiB
FRAMER = Framer(LAYOUT, b"weights and config")
FILE_BYTES = HEADER_BYTES + LAYOUT.block_bytes


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(24, "little"))


def payload(number: int) -> memoryview:
    return memoryview(bytes([number, *range(250)]) * (LAYOUT.block_bytes // 251 + 1))[: LAYOUT.block_bytes]


def store(number: int, **changes: Any) -> Store:
    return replace(Store(name(number), 256, payload(number), 0, first_position=256 * number), **changes)


def fetch(number: int, **changes: Any) -> Fetch:
    into = memoryview(bytearray(b"\xa5" * LAYOUT.block_bytes))
    return replace(Fetch(name(number), 256, into, first_position=256 * number), **changes)


OpenTier = Callable[..., DiskTier]


@pytest.fixture
def open_tier(tmp_path: Path) -> Iterator[OpenTier]:
    """Opens tiers of one folder; each is checked and closed, by hand or at the end."""
    tiers: list[DiskTier] = []

    def open_one(framer: Framer = FRAMER, **settings: Any) -> DiskTier:
        tier = open_disk_tier(tmp_path, framer, **{"capacity_bytes": 3 * FILE_BYTES, "max_queued": 8, **settings})
        assert tier is not None
        tiers.append(tier)
        return tier

    yield open_one
    for tier in tiers:
        if tier._writer.is_alive():
            close(tier)


def close(tier: DiskTier) -> None:
    tier.check()
    tier.close(flush_s=5)


def keep(tier: DiskTier, *stores: Store) -> None:
    told = threading.Semaphore(0)
    for one in stores:
        tier.offer(one, told.release)
    for _ in stores:
        assert told.acquire(timeout=10)
    assert tier.settled(timeout_s=10)


def has(tier: DiskTier, number: int) -> bool:
    """Whether a block is there; then it is what was kept."""
    asked = fetch(number)
    found = tier.read(asked)
    if isinstance(found, Encoding):
        assert asked.into == payload(number)
        return True
    assert found is Fetched.ABSENT
    assert not tier.contains(name(number))
    return False


def file_of(folder: Path, number: int) -> Path:
    [path] = folder.glob(f"rekindle-blocks-*/{name(number).hex()}")
    return path


def test_what_was_written_is_read_as_it_was(open_tier: OpenTier) -> None:
    tier = open_tier()
    small = store(2, payload=payload(2)[:1001], codec=INT8, fidelity=LADDER)
    keep(tier, store(1), small)
    assert has(tier, 1)
    asked = fetch(2, fidelity=LADDER)
    found = tier.read(asked)
    assert isinstance(found, Encoding)
    assert found[:2] == (INT8, 1001)
    assert asked.into[:1001] == payload(2)[:1001]
    assert set(asked.into[1001:]) == {0xA5}
    assert tier.stats()[:2] == (2, FILE_BYTES + HEADER_BYTES + 1001)
    assert tier.read(fetch(1, wanted=lambda: False)) is Fetched.SKIPPED


def test_the_next_worker_finds_it_and_evicts_what_was_least_recently_used(open_tier: OpenTier) -> None:
    tier = open_tier()
    keep(tier, store(1), store(2), store(3))
    assert has(tier, 1)
    close(tier)
    again = open_tier()
    assert again.stats()[:2] == (3, 3 * FILE_BYTES)
    keep(again, store(4), store(5))
    assert [has(again, number) for number in range(1, 6)] == [True, False, False, True, True]


def test_it_stays_within_its_bytes(open_tier: OpenTier, tmp_path: Path) -> None:
    tier = open_tier()
    for number in range(8):
        keep(tier, store(number))
        tier.check()
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) == 3 * FILE_BYTES
    close(tier)
    narrower = open_tier(capacity_bytes=2 * FILE_BYTES)
    assert narrower.stats().used_bytes == 2 * FILE_BYTES
    assert [has(narrower, number) for number in (5, 6, 7)] == [False, True, True]
    close(narrower)
    tiny = open_tier(capacity_bytes=100)
    keep(tiny, store(1))
    assert tiny.stats()[:4] == (0, 0, 100, 1)


def test_a_worker_killed_in_the_middle_of_a_write_leaves_no_half_block(open_tier: OpenTier, tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from tests.test_disk_tier import BlockFiles, FRAMER, FILE_BYTES, keep, store
from cache_store.disk_tier import open_disk_tier
tier = open_disk_tier(Path({str(tmp_path)!r}), FRAMER, capacity_bytes=9 * FILE_BYTES, max_queued=8)
keep(tier, store(1))
tier._files.write(store(2))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("*/*"))) == 2
    tier = open_tier()
    assert has(tier, 1)
    assert not has(tier, 2)
    assert list(tmp_path.glob("*/*")) == [file_of(tmp_path, 1)]


@pytest.mark.parametrize("length", [0, 10, HEADER_BYTES, FILE_BYTES - 1, FILE_BYTES + 1])
def test_a_file_of_the_wrong_length_is_deleted_by_the_scan(open_tier: OpenTier, tmp_path: Path, length: int) -> None:
    tier = open_tier()
    keep(tier, store(1), store(2))
    close(tier)
    os.truncate(file_of(tmp_path, 1), length)
    again = open_tier()
    assert [has(again, 1), has(again, 2)] == [False, True]
    assert list(tmp_path.glob("*/*")) == [file_of(tmp_path, 2)]


@pytest.mark.parametrize("at", [HEADER_BYTES, HEADER_BYTES + LAYOUT.block_bytes // 2, FILE_BYTES - 1])
def test_a_wrong_payload_is_a_miss_and_is_deleted(open_tier: OpenTier, tmp_path: Path, at: int) -> None:
    tier = open_tier()
    keep(tier, store(1))
    spoil(file_of(tmp_path, 1), at)
    assert tier.read(fetch(1)) is Fetched.CORRUPT
    assert not tier.contains(name(1))
    assert tier.stats().corrupt == 1
    assert list(tmp_path.glob("*/*")) == []
    keep(tier, store(1))
    assert has(tier, 1)


def spoil(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_whole_file_that_is_not_what_it_is_called_is_never_believed(open_tier: OpenTier, tmp_path: Path) -> None:
    tier = open_tier()
    keep(tier, store(1), store(2))
    file_of(tmp_path, 1).write_bytes(file_of(tmp_path, 2).read_bytes())
    assert tier.read(fetch(1)) is Fetched.CORRUPT
    assert tier.read(fetch(2, first_position=0)) is Fetched.CORRUPT, "of another place in the conversation"
    keep(tier, store(1))
    close(tier)
    file_of(tmp_path, 1).rename(file_of(tmp_path, 1).with_name(name(3).hex()))
    again = open_tier()
    assert again.stats().blocks == 0


def test_a_file_that_vanished_or_shrank_is_a_miss(open_tier: OpenTier, tmp_path: Path) -> None:
    tier = open_tier()
    keep(tier, store(1), store(2))
    file_of(tmp_path, 1).unlink()
    os.truncate(file_of(tmp_path, 2), FILE_BYTES - 5)
    assert not has(tier, 1)
    assert tier.read(fetch(2)) is Fetched.CORRUPT
    assert tier.stats()[:2] == (0, 0)


def test_other_models_blocks_are_apart_and_a_held_folder_is_left_alone(open_tier: OpenTier, tmp_path: Path) -> None:
    tier, other, second = open_tier(), open_tier(Framer(LAYOUT, b"other weights")), open_tier()
    keep(tier, store(1))
    assert not has(other, 1)
    assert not has(second, 1)
    close(second)
    close(other)
    for folder in tmp_path.iterdir():
        os.utime(folder, (0, 0))
    mine = tmp_path / "mine"
    mine.mkdir()
    open_tier()  # takes up the second's, and sweeps
    assert has(tier, 1)
    assert len(list(tmp_path.glob("rekindle-blocks-*"))) == 2
    assert mine.exists()


def test_a_dropped_block_is_gone_also_when_it_was_still_on_its_way(
    open_tier: OpenTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, may = threading.Event(), threading.Event()
    write = BlockFiles.write

    def slow(self: BlockFiles, block: Store) -> None:
        writing.set()
        assert may.wait(10)
        write(self, block)

    tier = open_tier()
    keep(tier, store(0))
    monkeypatch.setattr(BlockFiles, "write", slow)
    told: list[int] = []
    for number in (1, 2, 1):
        tier.offer(store(number), lambda number=number: told.append(number))  # type: ignore[misc]
    assert told == [1], "it is on its way already"
    assert writing.wait(10)
    assert tier.drop([name(0), name(1), name(2), name(3)]) == 1
    assert told == [1, 2]
    may.set()
    keep(tier, store(3))
    assert [has(tier, number) for number in range(4)] == [False, False, False, True]
    assert told == [1, 2, 1]
    close(tier)
    assert [path.name for path in tmp_path.glob("*/*")] == [name(3).hex()]


def test_a_queue_that_is_full_drops_and_counts(open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch) -> None:
    may = threading.Event()
    write = BlockFiles.write

    def slow(self: BlockFiles, block: Store) -> None:
        assert may.wait(10)
        write(self, block)

    monkeypatch.setattr(BlockFiles, "write", slow)
    tier = open_tier(max_queued=1, capacity_bytes=9 * FILE_BYTES)
    told: list[int] = []
    for number in range(6):
        tier.offer(store(number), lambda number=number: told.append(number))  # type: ignore[misc]
    assert tier.stats().dropped >= 4
    assert len(told) == tier.stats().dropped
    may.set()
    assert tier.settled(timeout_s=10)
    close(tier)
    assert sorted(told) == list(range(6))


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("rekindle-blocks-*/*"))


def test_what_cannot_be_deleted_stays_counted_and_goes_as_soon_as_it_can(
    open_tier: OpenTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier()
    keep(tier, store(1), store(2), store(3))
    with monkeypatch.context() as patch:
        refuse_to_unlink(patch, name(1).hex(), name(2).hex())
        keep(tier, store(4))  # 1 is to go for it, and stays
        assert tier.stats()[3:] == (1, 0, 1)
        assert tier.drop([name(2)]) == 1
        for number in (5, 6, 7):
            keep(tier, store(number))
            tier.check()
            assert tier.stats()[:2] == (1, 3 * FILE_BYTES)
            assert bytes_in(tmp_path) == 3 * FILE_BYTES
        assert [has(tier, number) for number in range(1, 8)] == [False] * 6 + [True]
    keep(tier, store(8))
    assert tier.stats()[:2] == (2, 2 * FILE_BYTES)
    assert bytes_in(tmp_path) == 2 * FILE_BYTES


def test_a_write_that_can_neither_be_finished_nor_deleted_stays_counted(
    open_tier: OpenTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier(capacity_bytes=2 * FILE_BYTES)

    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(BlockFiles, "publish", refuse)
        refuse_to_unlink(patch, f"{name(1).hex()}.new")
        keep(tier, store(1))
        assert tier.stats()[:2] == (0, FILE_BYTES) == (0, bytes_in(tmp_path))
    keep(tier, store(1))
    assert has(tier, 1)
    assert tier.stats()[:2] == (1, FILE_BYTES) == (1, bytes_in(tmp_path))


def test_what_an_earlier_worker_left_and_cannot_be_deleted_is_counted(
    open_tier: OpenTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier()
    keep(tier, store(1))
    spoil(file_of(tmp_path, 1), 0)
    close(tier)
    with monkeypatch.context() as patch:
        refuse_to_unlink(patch, name(1).hex())
        again = open_tier()
        assert again.stats()[:2] == (0, FILE_BYTES)
        close(again)
    assert bytes_in(tmp_path) == FILE_BYTES
    assert open_tier().stats()[:2] == (0, 0)


def refuse_to_unlink(patch: pytest.MonkeyPatch, *names: str) -> None:
    unlink = Path.unlink

    def refusing(path: Path, missing_ok: bool = False) -> None:
        if path.name in names:
            raise PermissionError(13, "Permission denied")
        unlink(path, missing_ok=missing_ok)

    patch.setattr(Path, "unlink", refusing)


def test_a_disk_that_fails_is_left_alone_after_a_while_and_nobody_hears_of_it(
    open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier()
    keep(tier, store(1))

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(BlockFiles, "write", refuse)
        keep(tier, store(2))
        keep(tier, store(3))
    assert tier.works
    keep(tier, store(4))
    assert has(tier, 4), "twice is no reason yet"
    with monkeypatch.context() as patch:
        patch.setattr(BlockFiles, "write", refuse)
        for number in (5, 6, 7):
            keep(tier, store(number))
    assert not tier.works
    keep(tier, store(8))
    assert not has(tier, 1)
    assert not has(tier, 8)
    assert tier.stats()[3:] == (6, 0, 5)


def test_a_write_that_fails_by_a_bug_gives_its_payload_back_and_the_next_one_is_written(
    open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier()

    def fail(*_: object) -> None:
        raise ValueError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(BlockFiles, "write", fail)
        keep(tier, store(1))
    keep(tier, store(2))
    assert not has(tier, 1)
    assert has(tier, 2)
    assert tier.stats()[3:] == (1, 0, 1)


def test_a_read_that_the_disk_refuses_is_a_miss(open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = open_tier()
    keep(tier, store(1))

    def refuse(*_: object) -> Encoding:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(BlockFiles, "read", refuse)
        assert tier.read(fetch(1)) is Fetched.UNAVAILABLE
    assert has(tier, 1)
    assert tier.stats().failures == 1


def test_what_nobody_held_for_longer_than_deletions_are_known_is_not_used(open_tier: OpenTier, tmp_path: Path) -> None:
    tier = open_tier()
    keep(tier, store(1))
    close(tier)
    [folder] = tmp_path.iterdir()
    long_ago_s = time.time() - DELETIONS_KNOWN_S - 60
    os.utime(folder, (long_ago_s, long_ago_s))
    assert not has(open_tier(), 1)


def test_without_a_folder_there_is_no_tier(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert open_disk_tier(tmp_path / "file", FRAMER, capacity_bytes=1, max_queued=1) is None
