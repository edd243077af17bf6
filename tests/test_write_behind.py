"""Blocks on their way down: whoever waits for them waits for all that may still write them."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from cache_store.codecs import LOSSLESS, RAW
from cache_store.host_slab import Slab
from cache_store.host_tier import HostTier
from cache_store.ids import chain, root_hash
from cache_store.layout import KVLayout
from cache_store.memory_store import MemoryBlockStore
from cache_store.store import Store
from worker.ids import BlockId
from worker.tiers.coder import BlockCoder
from worker.tiers.kv_cache import KVCache
from worker.tiers.moves import Content, MoveCounter
from worker.tiers.write_behind import Offload, WriteBehind

LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_tokens=16, dtype="float32")
BLOCK = Content(chain(root_hash(b"model", "tests"), range(16)), 16, 0, RAW.name, "tests")


class SlowStore(MemoryBlockStore):
    """Writes when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.may = threading.Event(), threading.Event()

    def put(self, blocks: Sequence[Store]) -> None:
        self.asked.set()
        assert self.may.wait(30)
        super().put(blocks)


@pytest.fixture
def store() -> SlowStore:
    return SlowStore()


@pytest.fixture
def write_behind(store: SlowStore) -> Iterator[WriteBehind]:
    coder = BlockCoder(KVCache(LAYOUT, 4, torch.device("cpu")), {}, first_rung=LOSSLESS.name)
    host = HostTier(Slab.private(capacity_bytes=4 * LAYOUT.block_bytes, block_bytes=LAYOUT.block_bytes))
    counter = MoveCounter(LAYOUT.block_bytes)
    write_behind = WriteBehind(coder, host, store, counter, max_pinned_blocks=4, max_queued_stores=4)
    yield write_behind
    store.may.set()
    write_behind.close(flush_s=5)
    host.check()


def test_a_flush_waits_for_a_park_or_what_is_deleted_after_it_would_be_written_again(
    write_behind: WriteBehind, store: SlowStore
) -> None:
    with ThreadPoolExecutor(1) as threads:
        parking = threads.submit(write_behind.park, [(BLOCK, BlockId(1))], ttl_s=60)
        assert store.asked.wait(30)
        assert not write_behind.flush([BLOCK.name], timeout_s=0.1)
        store.may.set()
        assert write_behind.flush([BLOCK.name], timeout_s=30)
        assert store.delete([BLOCK.name]) == 1
        assert parking.result(30) == ({BLOCK.name}, LAYOUT.block_bytes)
    assert store.which([BLOCK.name]) == [False]


def test_what_a_step_still_offloads_while_the_worker_closes_is_dropped_and_counted(write_behind: WriteBehind) -> None:
    copied, may = threading.Event(), threading.Event()
    told: list[bool] = []

    def hold() -> None:
        copied.set()
        assert may.wait(30)

    offload = Offload(block=BlockId(1), content=BLOCK, ttl_s=60, to_store=False, done=hold)
    write_behind.offload(offload)
    assert copied.wait(30)
    with ThreadPoolExecutor(1) as threads:
        closing = threads.submit(write_behind.close, flush_s=0)
        while not write_behind._copier._shutdown:
            time.sleep(0.001)
        write_behind.offload(replace(offload, done=lambda: told.append(True)))
        may.set()
        closing.result(30)
    assert told == [True]
    assert write_behind.stores_dropped == 1
