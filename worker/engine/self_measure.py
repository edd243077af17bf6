"""Measure this worker a little before its first request: a few prefill shapes, and the way from the store and back.

What requests cost from then on is learned from them. Nothing is left behind but some KV in blocks that are free.
"""

import os
import time
from collections.abc import Callable

import structlog

from cache_store.errors import StoreError
from cache_store.ids import BlockHash
from cache_store.layout import KVLayout
from cache_store.store import BlockStore, Encoding, Fetch, Fetched, Store
from worker.engine.cost_model import CostModel
from worker.engine.plan import Span
from worker.engine.step import Chunk
from worker.engine.stepper import Runner
from worker.ids import BlockId
from worker.tiers.moves import Tier
from worker.tiers.transfer_costs import TransferCosts

log = structlog.get_logger(__name__)

_NEW_TOKENS = (1, 16, 64, 256, 1024)
_CONTEXT = (1024, 16)
"""New tokens behind a context, for what attention costs."""
_BLOCKS = 4
_TTL_S = 60


def measure_prefill(
    runner: Runner,
    cost_model: CostModel,
    *,
    num_blocks: int,
    block_tokens: int,
    max_tokens: int,
    max_context_tokens: int,
    within_s: float,
) -> None:
    """Run prompts of growing length in the first blocks of the pool, as far as they are expected to end in time.

    None has more than `max_tokens` new ones. What fails is logged: requests can do with less, and will tell.
    """
    ends_s = time.perf_counter() + within_s
    room = min(num_blocks * block_tokens, max_context_tokens)
    context, new = _CONTEXT
    shapes = [Span(0, tokens) for tokens in _NEW_TOKENS[:3]]
    shapes += [Span(context, context + new), *(Span(0, tokens) for tokens in _NEW_TOKENS[3:])]
    fitting = [span for span in shapes if span.tokens <= max_tokens and span.end <= room]
    try:
        for span in fitting[:1]:
            _run(runner, span, block_tokens)  # the first step of all pays for what later ones find ready
        for span in fitting:
            if time.perf_counter() + cost_model.prefill_s(span) <= ends_s:
                cost_model.ran([span], _run(runner, span, block_tokens))
    except RuntimeError as error:  # such as no memory on the device
        log.warning("prefill not measured", error=str(error))


def _run(runner: Runner, span: Span, block_tokens: int) -> float:
    table = [BlockId(block) for block in range(-(-span.end // block_tokens))]
    began = time.perf_counter()
    runner.run([Chunk([0] * span.tokens, span.start, table, wants_logits=True)]).argmax(-1).tolist()
    return time.perf_counter() - began


def measure_store(store: BlockStore, layout: KVLayout, transfers: TransferCosts, *, within_s: float) -> None:
    """Put a few blocks under random names, read them and delete them. A store that does not answer is left alone."""
    names = [BlockHash(os.urandom(16)) for _ in range(_BLOCKS)]
    payload = memoryview(os.urandom(layout.block_bytes))
    try:
        store.put([Store(name, layout.block_tokens, payload, _TTL_S) for name in names])
        buffers = [memoryview(bytearray(layout.block_bytes)) for _ in names]  # a cluster's nodes answer side by side
        for _ in range(2):  # the first time pays for pages and connections
            begun: set[int] = set()
            fetches = [
                Fetch(name, layout.block_tokens, into, wanted=_noting(transfers, begun, index))
                for index, (name, into) in enumerate(zip(names, buffers, strict=True))
            ]
            store.get(fetches, _ending(transfers, begun), deadline_s=time.monotonic() + within_s)
        store.delete(names)
    except StoreError as error:
        log.info("store not measured", error=str(error))


def _noting(transfers: TransferCosts, begun: set[int], index: int) -> Callable[[], bool]:
    def is_wanted() -> bool:
        if index not in begun:  # else it is asked for again, elsewhere
            begun.add(index)
            transfers.asked(Tier.REDIS)
        return True

    return is_wanted


def _ending(transfers: TransferCosts, begun: set[int]) -> Callable[[int, Fetched, Encoding | None], None]:
    def landed(index: int, outcome: Fetched, encoding: Encoding | None) -> None:
        if index in begun:  # the others were refused without being asked for
            transfers.ended(Tier.REDIS, encoding.num_bytes if encoding is not None else None)

    return landed
