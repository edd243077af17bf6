"""How many sessions each tenant has in Redis, and how many tokens they have: counted by all front ends together.

A tenant's count is a hash of its own: tokens by session id, and their sum. A session is counted before it is there and
until it is gone, so that a front end that dies in between leaves too much rather than too little; what has gone is
taken off when the tenant's index is tidied. It is no part of a session's scripts, since in a cluster it is elsewhere.
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from cache_store import record_scripts as scripts
from cache_store.errors import LimitReached
from cache_store.record_scripts import Script
from cache_store.records import NO_QUOTA, Quota, Usage

_SUM = b""
"""The field that no session id is."""


class RedisCounts:
    """Raises what redis-py raises, besides LimitReached."""

    def __init__(self, redis: Any) -> None:
        self._redis = redis

    async def add(self, tenant: str, session_id: str, tokens: int, quota: Quota) -> bool:
        """Count a session that is about to be created, if there is room. False if it is counted already: it stays as
        it is, for it may be there. Raises LimitReached."""
        status = await self._run(scripts.COUNT, tenant, session_id, tokens, 1, quota.sessions, quota.tokens)
        if status == b"SESSIONS":
            raise LimitReached("max_sessions", quota.sessions)
        if status == b"TOKENS":
            raise LimitReached("max_tokens", quota.tokens)
        return bool(status == b"NEW")

    async def set(self, tenant: str, session_id: str, tokens: int) -> None:
        """Count a session's history as it will be."""
        await self._run(scripts.COUNT, tenant, session_id, tokens, 0, *NO_QUOTA)

    async def remove(self, tenant: str, session_ids: Sequence[str]) -> None:
        """Count these sessions no longer."""
        if session_ids:
            await self._run(scripts.UNCOUNT, tenant, *session_ids)

    async def read(self, tenant: str) -> Usage:
        key = _key(tenant)
        fields, tokens = await self._redis.hlen(key), await self._redis.hget(key, _SUM)
        return Usage(max(0, fields - 1), int(tokens or 0))

    async def _run(self, script: Script, tenant: str, *args: Any) -> Any:
        return await scripts.run(self._redis, script, [_key(tenant)], *args)


def _key(tenant: str) -> str:
    return f"rekindle:count:{quote(tenant, safe='')}"
