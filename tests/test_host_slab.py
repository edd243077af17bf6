"""A host tier's slab outlives its worker: what was published is found again, and nothing else is believed."""

import fcntl
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_store.codecs import INT8, RAW
from cache_store.host_claim import claim_file, claim_folder, deployment_folder, forget_abandoned
from cache_store.host_slab import Slab, open_slab
from cache_store.host_tier import HostTier
from cache_store.ids import BlockHash
from cache_store.store import DELETIONS_KNOWN_S, Encoding

BLOCK_BYTES = 4096
MODEL, OTHER_MODEL = b"m" * 16, b"o" * 16
RECORD_BYTES = 64


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(24, "little"))


def payload(number: int) -> bytes:
    return bytes((number * 7 + at * 13) % 251 for at in range(BLOCK_BYTES))


OpenTier = Callable[..., HostTier]


@pytest.fixture
def open_tier(tmp_path: Path) -> Iterator[OpenTier]:
    """Opens tiers of three slots in one folder; each is checked and closed, by hand or at the end."""
    tiers: list[HostTier] = []

    def open_one(model: bytes = MODEL, slots: int = 3) -> HostTier:
        slab = Slab.shared(tmp_path, model, capacity_bytes=slots * BLOCK_BYTES, block_bytes=BLOCK_BYTES)
        tiers.append(HostTier(slab))
        return tiers[-1]

    yield open_one
    for tier in tiers:
        close(tier)


def close(tier: HostTier) -> None:
    tier.check()
    tier.close()


def keep(tier: HostTier, number: int, *, num_bytes: int = BLOCK_BYTES) -> None:
    slot = tier.reserve(name(number), number)
    assert slot is not None
    slot.buffer[:num_bytes] = payload(number)[:num_bytes]
    tier.publish(slot, Encoding(RAW if num_bytes == BLOCK_BYTES else INT8, num_bytes))


def has(tier: HostTier, number: int) -> bool:
    """Whether a block is there; then it is what was kept."""
    slot = tier.pin(name(number))
    if slot is None:
        return False
    assert slot.payload == payload(number)[: slot.encoding.num_bytes]
    assert slot.num_tokens == number
    tier.unpin(slot)
    return True


def slab_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("rekindle-slab-*"))


def test_the_next_life_finds_what_this_one_published(open_tier: OpenTier) -> None:
    tier = open_tier()
    keep(tier, 1)
    keep(tier, 2, num_bytes=100)
    close(tier)
    assert tier.use() == (0, 0), "a closed tier has nothing to give"
    assert not has(tier, 1)
    again = open_tier()
    assert again.adopted == 2
    assert again.use() == (2, 3)
    assert has(again, 1)
    slot = again.pin(name(2))
    assert slot is not None
    assert slot.encoding.codec is INT8
    assert slot.payload == payload(2)[:100]
    again.unpin(slot)


def test_the_next_life_evicts_what_was_least_recently_used_in_this_one(open_tier: OpenTier) -> None:
    tier = open_tier()
    for number in (1, 2, 3):
        keep(tier, number)
    assert has(tier, 1)
    close(tier)
    again = open_tier()
    keep(again, 4)
    keep(again, 5)
    assert [has(again, number) for number in range(1, 6)] == [True, False, False, True, True]


def test_what_was_dropped_evicted_or_never_published_does_not_come_back(open_tier: OpenTier) -> None:
    tier = open_tier()
    keep(tier, 1)
    keep(tier, 2)
    keep(tier, 3)
    pinned = tier.pin(name(2))
    assert pinned is not None
    tier.drop([name(2)])  # pinned: its slot is still read
    reserved = tier.reserve(name(4), 4)  # in the place of 1
    assert reserved is not None
    reserved.buffer[:] = payload(4)
    tier.unpin(pinned)
    tier.abort(reserved)
    close(tier)
    again = open_tier()
    assert again.adopted == 1
    assert [has(again, number) for number in range(1, 5)] == [False, False, True, False]


def test_a_wrong_payload_is_a_miss_and_is_counted(open_tier: OpenTier, tmp_path: Path) -> None:
    tier = open_tier()
    keep(tier, 1)
    keep(tier, 2)
    close(tier)
    [file] = slab_files(tmp_path)
    content = bytearray(file.read_bytes())
    content[content.index(payload(1)) + 1000] ^= 1
    file.write_bytes(content)
    again = open_tier()
    assert again.contains(name(1)), "its record is right"
    assert not has(again, 1)
    assert again.corrupt == 1
    assert not again.contains(name(1))
    assert has(again, 2)
    assert again.use() == (1, 3)
    keep(again, 1)
    assert has(again, 1)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(bit=st.integers(0, 8 * 48 - 1))
def test_no_bit_of_a_record_can_flip_unseen(tmp_path: Path, bit: int) -> None:
    """But for the tick of its last use, which decides nothing but who is evicted."""
    assert (
        _found_after(tmp_path, lambda record: record[: bit // 8] + _flipped(record, bit) + record[bit // 8 + 1 :]) == 0
    )


def _flipped(record: bytes, bit: int) -> bytes:
    return bytes([record[bit // 8] ^ 1 << bit % 8])


@pytest.mark.parametrize("written", [0, 1, 24, 40, 48, 55])
def test_a_record_that_was_not_written_to_its_end_is_not_believed(tmp_path: Path, written: int) -> None:
    assert _found_after(tmp_path, lambda record: record[:written].ljust(RECORD_BYTES, b"\0")) == 0
    assert _found_after(tmp_path, lambda record: record) == 1


def _found_after(folder: Path, change: Callable[[bytes], bytes]) -> int:
    """How many blocks the next life finds when the only record is changed."""
    size = {"capacity_bytes": 3 * BLOCK_BYTES, "block_bytes": BLOCK_BYTES}
    tier = HostTier(Slab.shared(folder, MODEL, **size))
    tier.drop([name(1)])
    keep(tier, 1)
    path = tier.path
    assert path is not None
    close(tier)
    content = bytearray(path.read_bytes())
    [at] = [
        at for at in range(mmap.PAGESIZE, 2 * mmap.PAGESIZE, RECORD_BYTES) if bytes(content[at : at + 24]) == name(1)
    ]
    content[at : at + RECORD_BYTES] = change(bytes(content[at : at + RECORD_BYTES]))
    path.write_bytes(content)
    again = HostTier(Slab.shared(folder, MODEL, **size))
    close(again)
    return again.adopted


def test_a_record_is_not_believed_in_another_slots_place(open_tier: OpenTier, tmp_path: Path) -> None:
    tier = open_tier()
    keep(tier, 1)
    close(tier)
    [file] = slab_files(tmp_path)
    content = bytearray(file.read_bytes())
    first, second = mmap.PAGESIZE, mmap.PAGESIZE + RECORD_BYTES
    content[second : second + RECORD_BYTES] = content[first:second]
    content[first:second] = bytes(RECORD_BYTES)
    file.write_bytes(content)
    assert open_tier().adopted == 0


def test_a_worker_killed_in_the_middle_leaves_what_it_had_published(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from tests.test_host_slab import MODEL, BLOCK_BYTES, HostTier, Slab, keep, name, payload
tier = HostTier(Slab.shared(Path({str(tmp_path)!r}), MODEL, capacity_bytes=3 * BLOCK_BYTES, block_bytes=BLOCK_BYTES))
for number in (1, 2, 3):
    keep(tier, number)
slot = tier.reserve(name(4), 4)  # in the place of 1
slot.buffer[:2000] = payload(4)[:2000]
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False)
    assert ended.returncode == -signal.SIGKILL
    tier = HostTier(Slab.shared(tmp_path, MODEL, capacity_bytes=3 * BLOCK_BYTES, block_bytes=BLOCK_BYTES))
    assert [has(tier, number) for number in range(1, 5)] == [False, True, True, False]
    close(tier)


def test_a_slab_has_one_holder_and_the_next_takes_what_is_free(open_tier: OpenTier, tmp_path: Path) -> None:
    first, second = open_tier(), open_tier()
    keep(first, 1)
    keep(second, 2)
    assert len(slab_files(tmp_path)) == 2
    close(second)
    third = open_tier()
    assert has(third, 2)
    assert not has(third, 1)
    assert len(slab_files(tmp_path)) == 2


def test_a_slab_of_another_model_or_size_is_left_alone_until_it_is_old(open_tier: OpenTier, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("no slab")
    held = open_tier(OTHER_MODEL, 2)
    for model, slots in ((OTHER_MODEL, 3), (MODEL, 2)):
        tier = open_tier(model, slots)
        keep(tier, 1)
        close(tier)
    tier = open_tier()
    assert tier.adopted == 0
    assert len(slab_files(tmp_path)) == 4
    close(tier)
    for file in (mine, *slab_files(tmp_path)):
        os.utime(file, (0, 0))
    tier = open_tier()
    assert tier.path is not None
    assert held.path is not None
    assert slab_files(tmp_path) == sorted([tier.path, held.path])
    assert mine.exists()


@pytest.mark.parametrize("damage", [b"", b"RKSLAB", b"\xff" * 5 * BLOCK_BYTES])
def test_a_file_that_is_no_slab_begins_anew(open_tier: OpenTier, tmp_path: Path, damage: bytes) -> None:
    tier = open_tier()
    keep(tier, 1)
    close(tier)
    [file] = slab_files(tmp_path)
    file.write_bytes(damage)
    again = open_tier()
    assert again.adopted == 0
    keep(again, 2)
    assert has(again, 2)


def test_without_room_the_slab_is_private_and_nothing_is_left_behind(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"too large|No space"):
        Slab.shared(tmp_path, MODEL, capacity_bytes=1 << 60, block_bytes=1 << 30)
    assert slab_files(tmp_path) == []
    file = tmp_path / "file"
    file.touch()
    slab = open_slab(file / "no-folder", MODEL, capacity_bytes=3 * BLOCK_BYTES, block_bytes=BLOCK_BYTES)
    assert slab.path is None
    tier = HostTier(slab)
    keep(tier, 1)
    assert has(tier, 1)
    close(tier)


def test_only_its_owner_may_read_what_conversations_left(open_tier: OpenTier, tmp_path: Path) -> None:
    open_tier()
    [file] = slab_files(tmp_path)
    assert file.stat().st_mode & 0o777 == 0o600


def test_what_others_may_read_or_have_put_there_is_not_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = tmp_path / "thing-0"
    planted.touch()
    planted.chmod(0o666)
    with pytest.raises(PermissionError, match="open to others"):
        claim_file(tmp_path, "thing")
    planted.chmod(0o600)
    monkeypatch.setattr(os, "geteuid", lambda: planted.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="another user"):
        claim_file(tmp_path, "thing")
    (tmp_path / "folder-0").mkdir(mode=0o700)
    with pytest.raises(PermissionError):
        claim_folder(tmp_path, "folder")
    forget_abandoned(tmp_path, "*", older_than_s=-1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder-0", "thing-0"]


def test_a_pipe_in_a_deployments_place_keeps_nobody_waiting(tmp_path: Path) -> None:
    folder = tmp_path / "rekindle-planted"
    folder.mkdir()
    os.mkfifo(folder / "owner", 0o666)
    with deployment_folder(tmp_path) as ours:
        assert ours is not None
    assert folder.exists()


def test_claims_are_numbered_and_taken_up_in_order(tmp_path: Path) -> None:
    claims = [claim_file(tmp_path, "thing") for _ in range(3)]
    assert [claim.path.name for claim in claims] == ["thing-0", "thing-1", "thing-2"]
    assert all(first.descriptor != second.descriptor for first, second in pairwise(claims))
    claims.pop(1).release()
    claims += [claim_file(tmp_path, "thing"), claim_file(tmp_path, "other")]
    assert [claim.path.name for claim in claims[2:]] == ["thing-1", "other-0"]
    for claim in claims:
        claim.release()


def test_a_deployments_folder_goes_with_it_and_at_the_latest_with_the_next_one(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from cache_store.host_claim import deployment_folder
with deployment_folder(Path({str(tmp_path)!r})) as folder:
    (folder / "slab").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    [orphan] = tmp_path.iterdir()
    assert (orphan / "slab").exists()
    (tmp_path / "rekindle-named-by-hand").mkdir()
    with deployment_folder(tmp_path) as first, deployment_folder(tmp_path) as second:
        assert first is not None
        assert second is not None
        assert not orphan.exists()
        assert first.exists()
        (first / "slab").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["rekindle-named-by-hand"]


def test_a_folder_that_is_being_made_is_not_swept_by_who_starts_at_the_same_instant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, others = fcntl.flock, ExitStack()

    def flock(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        others.enter_context(deployment_folder(tmp_path))  # another comes before the lock is taken
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with others, deployment_folder(tmp_path) as folder:
        assert folder is not None
        assert folder.is_dir()
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == []


def test_what_nobody_held_for_longer_than_deletions_are_known_is_not_used(open_tier: OpenTier, tmp_path: Path) -> None:
    tier = open_tier()
    keep(tier, 1)
    close(tier)
    [slab] = slab_files(tmp_path)
    long_ago_s = time.time() - DELETIONS_KNOWN_S - 60
    os.utime(slab, (long_ago_s, long_ago_s))
    assert open_tier().adopted == 0


def test_without_shared_memory_a_deployment_has_no_folder(tmp_path: Path) -> None:
    with deployment_folder(tmp_path / "missing") as folder:
        assert folder is None
