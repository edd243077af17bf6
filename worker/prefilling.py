"""Computes the KV of texts by themselves, and keeps it in the tiers: it is inserted where turns read these texts."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import count
from typing import TypeVar

from cache_store.codecs import SESSION_CODECS, fidelity_of
from cache_store.inserts import LINK_TOKENS
from worker.calls import DropReport, Failed, Finished, GenerateCall, Sampling, Token
from worker.crossing import Crossing, EventStream
from worker.engine_like import EngineLike

T = TypeVar("T")

_GREEDY = Sampling()
_FIDELITIES = {fidelity_of(codec): codec for codec in SESSION_CODECS}.values()
"""A codec of each fidelity: blocks of one have the same names."""


class Prefilling:
    """Lives on one event loop."""

    def __init__(self, engine: EngineLike, crossing: Crossing) -> None:
        self._engine = engine
        self._crossing = crossing
        self._numbers = count(1)

    async def prefill(
        self, tenant: str, token_ids: Sequence[int], *, codec: str, ttl_s: int, deadline_s: float | None
    ) -> bool:
        """Have the KV of these tokens in Redis for so long (0: for ever), or in this worker's tiers where it has no
        Redis. False where it is not worth it: none of it would be inserted. Raises what a turn does."""
        tokens = tuple(token_ids)
        if len(tokens) <= LINK_TOKENS or not self._engine.can_insert:
            return False
        has_store = self._engine.stats().store_available is not None
        whole = (*tokens, 0)  # as if that had been said: a history's last token has no KV
        if has_store:
            held = await _answer(self._engine.locate(tenant, whole, codec=codec, with_redis=True))
            if held.redis_tokens == len(tokens):
                await _answer(self._engine.retain(tenant, whole, codec=codec, ttl_s=ttl_s))
                return True
        said = await self._run(tenant, tokens, codec, ttl_s, deadline_s)
        if has_store:
            parked = await _answer(
                self._engine.park(tenant, (*tokens, said), codec=codec, drop_host=False, ttl_s=ttl_s)
            )
            return parked.redis_tokens == len(tokens)
        return True

    async def drop(self, tenant: str, token_ids: Sequence[int], *, with_redis: bool) -> list[DropReport]:
        """Drop it again, of whatever codec."""
        whole = (*token_ids, 0)
        drops = [self._engine.drop(tenant, whole, codec=codec, with_redis=with_redis) for codec in _FIDELITIES]
        return [await _answer(drop) for drop in drops]

    async def _run(self, tenant: str, tokens: tuple[int, ...], codec: str, ttl_s: int, deadline_s: float | None) -> int:
        """Compute them; one token more is said."""
        call = GenerateCall(
            request_id=f"prefill#{next(self._numbers)}",
            tenant=tenant,
            history=(),
            input=tokens,
            sampling=_GREEDY,
            max_new_tokens=1,
            block_ttl_s=ttl_s,
            deadline_s=deadline_s,
            codec=codec,
        )
        stream, said = EventStream(), 0
        self._engine.submit(call, self._crossing.into(stream))
        try:
            while True:
                for event in await stream.take():
                    if isinstance(event, Failed):
                        raise event.error
                    if isinstance(event, Finished):
                        return said
                    assert isinstance(event, Token)
                    said = event.token_id
        finally:
            self._engine.cancel(call.request_id)


async def _answer(future: Future[T]) -> T:
    """Shielded: a client that goes away must not cancel what the engine is about to answer."""
    return await asyncio.shield(asyncio.wrap_future(future))
