"""A worker's look at itself before it starts: whatever the store does, the estimates can still be put right later."""

import threading
from collections.abc import Sequence

from cache_store.layout import KVLayout
from cache_store.memory_store import MemoryBlockStore
from cache_store.store import Fetch, Fetched, Landed
from worker.engine.self_measure import measure_store
from worker.tiers.moves import Tier
from worker.tiers.transfer_costs import TransferCosts

LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_tokens=16, dtype="float32")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class LateStore(MemoryBlockStore):
    """Asks for two blocks, and gives up all of them before they come."""

    def get(self, wanted: Sequence[Fetch], landed: Landed, *, deadline_s: float) -> None:
        assert all(fetch.wanted is not None and fetch.wanted() for fetch in wanted[:2])
        for index in range(len(wanted)):
            landed(index, Fetched.LATE, None)


class MovedStore(MemoryBlockStore):
    """Asks for each block twice, as after a redirection, and lets all of them land side by side."""

    def get(self, wanted: Sequence[Fetch], landed: Landed, *, deadline_s: float) -> None:
        assert all(fetch.wanted is not None and fetch.wanted() for fetch in wanted)
        assert len({id(fetch.into.obj) for fetch in wanted}) == len(wanted), "two blocks land in one buffer"
        threads = [
            threading.Thread(
                target=MemoryBlockStore.get,
                args=(self, [fetch], lambda _, outcome, encoding, index=index: landed(index, outcome, encoding)),
                kwargs={"deadline_s": deadline_s},
            )
            for index, fetch in enumerate(wanted)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def is_probed_after(store: MemoryBlockStore) -> bool:
    clock = Clock()
    transfers = TransferCosts(LAYOUT.block_bytes, now=clock)
    measure_store(store, LAYOUT, transfers, within_s=5)
    clock.now_s += 60
    return transfers.is_due_for_probe(Tier.REDIS)


def test_a_store_too_slow_to_be_measured_is_probed_later() -> None:
    assert is_probed_after(LateStore())


def test_a_store_that_redirects_is_probed_later() -> None:
    assert is_probed_after(MovedStore())
