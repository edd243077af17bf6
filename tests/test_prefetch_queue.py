"""Queued requests' blocks come to the host tier ahead: in part or wholly, never at others' cost, and not once wrong."""

import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from cache_store.host_slab import open_slab
from cache_store.host_tier import HostTier
from cache_store.ids import BlockHash, chain, root_hash
from cache_store.layout import KVLayout
from cache_store.memory_store import MemoryBlockStore
from cache_store.store import Fetch, Landed, Store
from tests.engines import TENANT, EngineFactory, generate, poison, start
from worker.tiers.moves import Content, MoveCounter
from worker.tiers.prefetch import Prefetcher

LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=32, block_tokens=16, dtype="float32")
ROOT = root_hash(b"model", "tenant")
CAPACITY = 40


def name(number: int) -> BlockHash:
    return chain(ROOT, [number])


def payload(number: int) -> bytes:
    return bytes([number + 1]) * LAYOUT.block_bytes


def contents(*numbers: int) -> list[Content]:
    return [Content(name(number), 16, 0, "raw", "tests") for number in numbers]


def eventually(holds: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < give_up, "it never came true"
        time.sleep(0.005)


class Store40(MemoryBlockStore):
    """Forty blocks; `before_get` is called with each batch that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.put([Store(name(number), 16, memoryview(payload(number)), 0) for number in range(CAPACITY)])
        self.batches: list[int] = []
        self.before_landing: Callable[[], object] = lambda: None

    def get(self, wanted: Sequence[Fetch], landed: Landed, *, deadline_s: float) -> None:
        self.batches.append(len(wanted))
        self.before_landing()
        super().get(wanted, landed, deadline_s=deadline_s)


@pytest.fixture
def store() -> Store40:
    return Store40()


@pytest.fixture
def host() -> Iterator[HostTier]:
    slab = open_slab(None, b"", capacity_bytes=CAPACITY * LAYOUT.block_bytes, block_bytes=LAYOUT.block_bytes)
    host = HostTier(slab)
    yield host
    host.check()
    host.close()


@pytest.fixture
def prefetcher(host: HostTier, store: Store40) -> Iterator[Prefetcher]:
    prefetcher = Prefetcher(host, store, MoveCounter(LAYOUT.block_bytes), timeout_s=5.0)
    yield prefetcher
    prefetcher.close()


def here(host: HostTier) -> set[int]:
    return {number for number in range(CAPACITY) if host.contains(name(number))}


def test_what_waits_comes_to_host_memory_bit_for_bit(prefetcher: Prefetcher, host: HostTier) -> None:
    assert prefetcher.fetch(contents(*range(10)), lambda: True)
    eventually(lambda: here(host) == set(range(10)))
    for number in range(10):
        slot = host.pin(name(number))
        assert slot is not None
        assert slot.payload == payload(number)
        host.unpin(slot)


def test_the_last_blocks_come_first_and_half_of_host_memory_is_all_there_is(
    prefetcher: Prefetcher, host: HostTier, store: Store40
) -> None:
    waits = [True, True]
    assert prefetcher.fetch(contents(*range(30)), lambda: waits[0])
    eventually(lambda: here(host) == set(range(10, 30)))
    assert store.batches == [8, 8, 4]
    assert not prefetcher.fetch(contents(30, 31), lambda: waits[1]), "no room while the first one waits"
    waits[0] = False
    assert prefetcher.fetch(contents(30, 31), lambda: waits[1])
    eventually(lambda: here(host) >= {30, 31})


def test_one_who_waits_no_longer_is_brought_no_more(prefetcher: Prefetcher, host: HostTier, store: Store40) -> None:
    waits = [True]
    store.before_landing = waits.clear
    assert prefetcher.fetch(contents(*range(20)), lambda: bool(waits))
    eventually(lambda: len(here(host)) == 8)
    prefetcher.close()
    assert store.batches == [8]
    assert here(host) == set(range(12, 20))


def test_what_is_pinned_stays(prefetcher: Prefetcher, host: HostTier) -> None:
    waits = [True]
    assert prefetcher.fetch(contents(*range(20)), lambda: bool(waits))
    eventually(lambda: len(here(host)) == 20)
    pinned = [slot for number in range(20) if (slot := host.pin(name(number))) is not None]
    for number in range(100, 100 + CAPACITY - 20):  # others' blocks take the rest, pinned too
        slot = host.reserve(name(number), 16)
        assert slot is not None
        pinned.append(slot)
    waits.clear()
    assert prefetcher.fetch(contents(*range(20, 30)), lambda: True)
    prefetcher.close()
    assert here(host) == set(range(20))
    for slot in pinned[20:]:
        host.abort(slot)
    for slot in pinned[:20]:
        host.unpin(slot)


def test_what_is_found_wrong_while_it_comes_is_not_kept(prefetcher: Prefetcher, host: HostTier, store: Store40) -> None:
    store.before_landing = prefetcher.disown
    assert prefetcher.fetch(contents(*range(20)), lambda: True)
    eventually(lambda: store.batches == [8])
    prefetcher.close()
    assert store.batches == [8]
    assert not here(host)


def test_a_store_that_breaks_leaves_no_slot_taken(prefetcher: Prefetcher, host: HostTier, store: Store40) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    store.before_landing = fail
    assert prefetcher.fetch(contents(*range(8)), lambda: True)
    eventually(lambda: store.batches == [8])
    prefetcher.close()
    assert host.use().blocks == 0
    assert host.awaited(name(0)) is None


def test_a_step_that_still_runs_while_the_worker_closes_may_ask(
    prefetcher: Prefetcher, host: HostTier, store: Store40
) -> None:
    prefetcher.close()
    assert prefetcher.fetch(contents(*range(20)), lambda: True)
    assert not store.batches
    assert not here(host)


def test_a_queued_turn_finds_its_blocks_in_host_memory_when_it_is_let_in(
    build_engine: EngineFactory, redis_url: str
) -> None:
    engine = build_engine(redis_url=redis_url, max_running=1)
    history = tuple(range(3, 203))
    first = generate(engine, history[:-1], history[-1:])
    history += first.reply
    engine.park(TENANT, history, drop_host=True, ttl_s=60).result(30)
    poison(engine)
    ahead = start(engine, (), range(300, 340), max_new_tokens=400)
    ahead.next()
    queued = start(engine, history, (7, 8, 9))

    def host_tokens() -> int:
        return engine.locate(TENANT, history, with_redis=False).result(30).host_tokens

    eventually(lambda: host_tokens() == len(history) - 1)
    engine.cancel(ahead.request_id)
    turn = queued.result()
    assert turn.receipt.host_tokens == len(history) - 1
    assert turn.receipt.redis_tokens == 0
    alone = build_engine(redis_url="")
    assert turn.reply == generate(alone, history, (7, 8, 9)).reply
