"""The restorer's threads: what nobody wants any more is left, and whatever fails, no block stays half brought."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from cache_store.codecs import LOSSLESS, RAW, CodecInfo
from cache_store.disk_files import BlockFiles
from cache_store.disk_tier import DiskTier, open_disk_tier
from cache_store.frame import Framer
from cache_store.host_slab import Slab
from cache_store.host_tier import HostTier, Slot
from cache_store.ids import BlockHash, chain, root_hash
from cache_store.layout import KVLayout
from cache_store.memory_store import MemoryBlockStore
from cache_store.store import BlockStore, Encoding, Fetch, Landed, Store
from worker.calls import MissReason
from worker.ids import BlockId
from worker.tiers.claims import Claims, Restored
from worker.tiers.coder import BlockCoder
from worker.tiers.kv_cache import KVCache
from worker.tiers.landing import DECODERS, Restore
from worker.tiers.moves import Content, MoveCounter
from worker.tiers.restore import Restorer
from worker.tiers.transfer_costs import TransferCosts

LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_tokens=16, dtype="float32")
ROOT = root_hash(b"model", "tenant")
BLOCKS = 12


def name(number: int) -> BlockHash:
    return chain(ROOT, [number])


def payload(number: int) -> bytes:
    return bytes([number + 1]) * LAYOUT.block_bytes


def eventually(holds: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < give_up, "it never came true"
        time.sleep(0.005)


class GatedCodec:
    """Decodes when it may; fails where it is told to."""

    info: CodecInfo = LOSSLESS

    def __init__(self) -> None:
        self.begun = 0
        self.may = threading.Event()
        self.error: Exception | None = None

    def encode(self, kv: torch.Tensor, into: memoryview, *, num_tokens: int, first_position: int) -> int:
        raise AssertionError("nothing is encoded here")

    def decode(self, payload: memoryview, kv: torch.Tensor, *, num_tokens: int, first_position: int) -> None:
        self.begun += 1
        assert self.may.wait(10)
        if self.error is not None:
            raise self.error


@pytest.fixture
def codec() -> Iterator[GatedCodec]:
    codec = GatedCodec()
    yield codec
    codec.may.set()


@pytest.fixture
def host() -> Iterator[HostTier]:
    host = HostTier(Slab.private(capacity_bytes=BLOCKS * LAYOUT.block_bytes, block_bytes=LAYOUT.block_bytes))
    yield host
    host.check()
    host.close()  # nothing is pinned or reserved


OpenRestorer = Callable[..., Restorer]


@pytest.fixture
def open_restorer(host: HostTier, codec: GatedCodec, tmp_path: Path) -> Iterator[OpenRestorer]:
    """Opens restorers of one host tier; each is closed at the end, when all may be decoded."""
    restorers: list[Restorer] = []

    def open_one(store: BlockStore | None = None, on_disk: Sequence[int] = ()) -> Restorer:
        disk = None
        if on_disk:
            framer = Framer(LAYOUT, b"model")
            disk = open_disk_tier(tmp_path, framer, capacity_bytes=1 << 20, max_queued=BLOCKS)
            assert disk is not None
            for number in on_disk:
                disk.offer(Store(name(number), 16, memoryview(payload(number)), 0), lambda: None)
            assert disk.settled(timeout_s=10)
        coder = BlockCoder(
            KVCache(LAYOUT, BLOCKS, torch.device("cpu")), {LOSSLESS.name: codec}, first_rung=LOSSLESS.name
        )
        costs = TransferCosts(LAYOUT.block_bytes)
        restorer = Restorer(coder, host, store, MoveCounter(LAYOUT.block_bytes), costs, disk)
        restorers.append(restorer)
        if disk is not None:
            disks.append(disk)
        return restorer

    disks: list[DiskTier] = []
    yield open_one
    codec.may.set()
    for restorer in restorers:
        restorer.close()
    for disk in disks:
        disk.close(flush_s=5)


def keep(host: HostTier, *numbers: int, codec: CodecInfo = RAW) -> None:
    for number in numbers:
        slot = host.reserve(name(number), 16)
        assert slot is not None
        slot.buffer[:] = payload(number)
        host.publish(slot, Encoding(codec, LAYOUT.block_bytes))


def restore(restorer: Restorer, *numbers: int) -> Claims:
    claims = Claims(len(numbers), lambda: None)
    blocks = [Restore(Content(name(number), 16, 0, "raw", "tests"), BlockId(number)) for number in numbers]
    restorer.restore(blocks, claims, deadline_s=time.monotonic() + 10)
    return claims


def test_a_block_in_memory_may_be_computed_until_it_is_its_turn_to_be_decoded(
    open_restorer: OpenRestorer, host: HostTier, codec: GatedCodec
) -> None:
    keep(host, *range(10), codec=LOSSLESS)
    claims = restore(open_restorer(), *range(10))
    eventually(lambda: codec.begun == DECODERS)
    claims.take_all(MissReason.LATE)
    assert claims.num_open == DECODERS
    codec.may.set()
    eventually(lambda: claims.is_settled)
    assert codec.begun == DECODERS


def test_what_an_earlier_life_left_is_verified_only_where_it_is_still_wanted(
    open_restorer: OpenRestorer, host: HostTier
) -> None:
    keep(host, 0, 1)
    for number in (0, 1):  # as if found in a slab, and spoilt there
        slot = host._published[name(number)]
        slot.is_proven, slot.buffer[0] = False, 0
    claims = Claims(2, lambda: None)
    assert claims.take(0, MissReason.FASTER)
    blocks = [Restore(Content(name(number), 16, 0, "raw", "tests"), BlockId(number)) for number in (0, 1)]
    restorer = open_restorer()
    restorer.restore(blocks, claims, deadline_s=time.monotonic() + 10)
    restorer.close()  # the first one has been looked at, too
    assert claims.is_settled
    assert [host.contains(name(number)) for number in (0, 1)] == [True, False]
    assert host.corrupt == 1


def test_a_disk_that_hangs_holds_up_no_block_in_memory(
    open_restorer: OpenRestorer, host: HostTier, codec: GatedCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec.may.set()
    restorer = open_restorer(on_disk=range(1, 9))
    keep(host, 0, codec=LOSSLESS)
    hangs, may = threading.Event(), threading.Event()
    read = BlockFiles.read

    def hang(self: BlockFiles, fetch: Fetch) -> Encoding:
        hangs.set()
        assert may.wait(10)
        return read(self, fetch)

    monkeypatch.setattr(BlockFiles, "read", hang)
    from_disk = restore(restorer, *range(1, 9))
    assert hangs.wait(10)
    in_memory = restore(restorer, 0)
    eventually(lambda: in_memory.is_settled)
    may.set()
    eventually(lambda: from_disk.is_settled)


def test_what_nobody_wants_any_more_is_not_read_from_the_disk(
    open_restorer: OpenRestorer, host: HostTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    restorer = open_restorer(on_disk=range(10))
    begun: list[BlockHash] = []
    may = threading.Event()
    read = BlockFiles.read

    def slow(self: BlockFiles, fetch: Fetch) -> Encoding:
        begun.append(fetch.block)
        assert may.wait(10)
        return read(self, fetch)

    monkeypatch.setattr(BlockFiles, "read", slow)
    claims = restore(restorer, *range(10))
    eventually(lambda: len(begun) == DECODERS)
    claims.take_all(MissReason.LATE)
    assert claims.is_settled
    may.set()
    restorer.close()
    assert len(begun) == DECODERS
    assert host.use().blocks == DECODERS, "what was read stays"


def test_a_decoder_that_fails_leaves_a_miss(
    open_restorer: OpenRestorer, host: HostTier, codec: GatedCodec, tmp_path: Path
) -> None:
    keep(host, *range(6), codec=LOSSLESS)
    codec.error = MemoryError("the device has no room to decode")
    claims = restore(open_restorer(), *range(6))
    eventually(lambda: codec.begun == DECODERS)
    assert claims.num_open == 6
    codec.may.set()
    eventually(lambda: claims.is_settled)
    assert claims.outcomes() == [MissReason.ABSENT] * 6


class BrokenStore(MemoryBlockStore):
    """Brings one block, and breaks."""

    def get(self, wanted: Sequence[Fetch], landed: Landed, *, deadline_s: float) -> None:
        assert all(fetch.wanted is not None and fetch.wanted() for fetch in wanted)
        super().get(wanted[:1], landed, deadline_s=deadline_s)
        raise RuntimeError("a bug")


def test_a_store_that_breaks_leaves_misses_and_no_slot_taken(
    open_restorer: OpenRestorer, host: HostTier, codec: GatedCodec
) -> None:
    store = BrokenStore()
    store.put([Store(name(number), 16, memoryview(payload(number)), 0) for number in range(4)])
    restorer = open_restorer(store)
    claims = restore(restorer, *range(4))
    eventually(lambda: claims.is_settled)
    assert [isinstance(outcome, Restored) for outcome in claims.outcomes()] == [False] * 3 + [True]
    restorer.close()
    assert host.use().blocks == 1


def test_a_block_whose_bringer_gives_up_just_then_is_brought_all_the_same(
    open_restorer: OpenRestorer, host: HostTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryBlockStore()
    store.put([Store(name(0), 16, memoryview(payload(0)), 0)])
    reserve = host.reserve
    others = [reserve(name(0), 16)]

    def meet_another(block: BlockHash, num_tokens: int) -> Slot | None:
        slot = reserve(block, num_tokens)
        for other in others:
            assert other is not None
            host.abort(other)
        others.clear()
        return slot

    monkeypatch.setattr(host, "reserve", meet_another)
    claims = restore(open_restorer(store), 0)
    eventually(lambda: claims.is_settled)
    assert isinstance(claims.outcomes()[0], Restored)
