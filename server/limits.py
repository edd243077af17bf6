"""How much a tenant may have at once: turns on this front end, sessions and their tokens in the whole deployment."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from cache_store.bank_store import BankPage
from cache_store.errors import LimitReached
from cache_store.records import Quota, RecordStore, SessionRecord
from server.identity import Identities

_RECOUNT_S = 10.0
"""A tenant at its limit has its sessions looked at again (some may have expired) no more often."""


class PagedBanks(Protocol):
    """Part of a BankKeeper."""

    async def page(self, tenant: str, *, page_size: int, page_token: str) -> BankPage: ...


class Limits:
    """Every call may raise LimitReached."""

    def __init__(self, identities: Identities, records: RecordStore, *, recount_s: float = _RECOUNT_S) -> None:
        self._identities = identities
        self._records = records
        self._recount_s = recount_s
        self._running: Counter[str] = Counter()
        self._recounted_s: dict[str, float] = {}

    @contextmanager
    def turn(self, tenant: str) -> Iterator[None]:
        """Hold one of the turns that the tenant may run at once."""
        most = self._identities.limits(tenant).max_turns
        if most and self._running[tenant] >= most:
            raise LimitReached("max_turns", most)
        self._running[tenant] += 1
        try:
            yield
        finally:
            self._running[tenant] -= 1
            if not self._running[tenant]:
                del self._running[tenant]

    async def check_tokens(self, tenant: str) -> None:
        """Let a session go on as long as the tenant is below its limit: what is begun then may end above it."""
        most = self._identities.limits(tenant).max_tokens
        if not most or (await self._records.usage(tenant)).tokens < most:
            return
        if not self._may_recount(tenant) or (await self._records.recount(tenant)).tokens >= most:
            raise LimitReached("max_tokens", most)

    async def create(self, record: SessionRecord) -> None:
        """Keep a new record within the tenant's limits. Raises SessionExists, too."""
        limits = self._identities.limits(record.tenant)
        quota = Quota(limits.max_sessions, limits.max_tokens)
        try:
            await self._records.create(record, quota=quota)
        except LimitReached:
            if not self._may_recount(record.tenant):
                raise
            await self._records.recount(record.tenant)
            await self._records.create(record, quota=quota)

    async def check_banks(self, tenant: str, banks: PagedBanks) -> None:
        """Let a tenant have one more bank. Who creates several at once may get one or two more than its limit."""
        most = self._identities.limits(tenant).max_banks
        if most and len((await banks.page(tenant, page_size=most, page_token="")).records) >= most:
            raise LimitReached("max_banks", most)

    def _may_recount(self, tenant: str) -> bool:
        now_s = time.monotonic()
        if now_s - self._recounted_s.get(tenant, -self._recount_s) < self._recount_s:
            return False
        self._recounted_s[tenant] = now_s
        return True
