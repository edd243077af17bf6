"""A worker's look at itself before it starts: whatever the store does, the estimates can still be put right later."""

import threading
from collections.abc import Sequence

import pytest
import torch

from cache_store.layout import KVLayout
from cache_store.memory_store import MemoryBlockStore
from cache_store.store import Fetch, Fetched, Landed
from worker.engine.cost_model import CostModel
from worker.engine.plan import Span
from worker.engine.self_measure import measure_prefill, measure_store
from worker.engine.step import Chunk
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


class SmallRunner:
    """Runs steps of up to so many tokens, and remembers them."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.ran: list[Span] = []

    def run(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        [chunk] = chunks
        if len(chunk.token_ids) > self.max_tokens:
            raise torch.OutOfMemoryError("no room for this step")
        self.ran.append(Span(chunk.start, chunk.start + len(chunk.token_ids)))
        return torch.zeros(1, 8)


def measured(runner: SmallRunner, *, max_tokens: int, max_context_tokens: int) -> list[Span]:
    model = CostModel(max_prefill_tokens=max_tokens)
    measure_prefill(
        runner,
        model,
        num_blocks=1000,
        block_tokens=16,
        max_tokens=max_tokens,
        max_context_tokens=max_context_tokens,
        within_s=60,
    )
    return runner.ran


def test_no_step_is_measured_that_no_request_may_have() -> None:
    ran = measured(SmallRunner(1 << 20), max_tokens=256, max_context_tokens=1 << 20)
    assert max(span.tokens for span in ran) == 256
    assert max(span.end for span in ran) > 1024
    ran = measured(SmallRunner(1 << 20), max_tokens=4096, max_context_tokens=512)
    assert max(span.end for span in ran) == 256


@pytest.mark.parametrize("max_tokens", [0, 100])
def test_a_step_that_fails_ends_the_measuring_and_not_the_worker(max_tokens: int) -> None:
    ran = measured(SmallRunner(max_tokens), max_tokens=4096, max_context_tokens=4096)
    assert len(ran) == (4 + 1 if max_tokens else 0)
