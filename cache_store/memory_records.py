"""Session records in a dict: for tests, and for one front end without Redis. Gone when it stops."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from cache_store.attachments import BankAttachment
from cache_store.errors import InvalidRequest, LimitReached, SessionBusy, SessionExists, SessionNotFound
from cache_store.records import NO_QUOTA, Page, Quota, SessionRecord, TurnRecord, Usage
from cache_store.store import ServerInfo

_GONE_S = 300.0
"""As Redis remembers them."""


@dataclass(slots=True)
class _Kept:
    record: SessionRecord
    expires_s: float
    holder: str = ""
    lease_ends_s: float = 0.0
    committed_by: str = ""
    gone: dict[str, float] = field(default_factory=dict)
    """Holders that have released, and until when that is remembered."""


class MemoryRecords:
    """A `RecordStore`. `now` is Unix time in seconds."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._kept: dict[tuple[str, str], _Kept] = {}
        self._alive_until_s: dict[str, float] = {}

    async def create(self, record: SessionRecord, *, quota: Quota = NO_QUOTA) -> None:
        key = (record.tenant, record.session_id)
        if self._alive(key) is not None:
            raise SessionExists(f"session {record.session_id} exists")
        if quota != NO_QUOTA:
            self._check(quota, await self.usage(record.tenant), len(record.token_ids))
        kept = _Kept(replace(record, num_tokens=len(record.token_ids)), expires_s=0.0)
        self._kept[key] = kept
        self._keep(kept)

    async def get(self, tenant: str, session_id: str) -> SessionRecord:
        return self._find(tenant, session_id).record

    async def list(self, tenant: str, *, page_size: int, page_token: str) -> Page:
        alive = [self._alive(key) for key in list(self._kept) if key[0] == tenant]
        records = [kept.record for kept in alive if kept is not None]
        records.sort(key=lambda record: (record.created_ms, record.session_id), reverse=True)
        if page_token:
            before = _parse(page_token)
            records = [record for record in records if (record.created_ms, record.session_id) < before]
        page = [replace(record, turns=(), token_ids=()) for record in records[:page_size]]
        more = len(records) > page_size
        return Page(page, f"{page[-1].created_ms}/{page[-1].session_id}" if more else "")

    async def update(
        self,
        tenant: str,
        session_id: str,
        *,
        ttl_s: int | None,
        pinned: bool | None,
        banks: tuple[BankAttachment, ...] | None = None,
    ) -> SessionRecord:
        kept = self._find(tenant, session_id)
        if banks is not None:
            if kept.holder and self._now() < kept.lease_ends_s:
                raise SessionBusy(f"another call holds session {session_id}")
            kept.record = replace(kept.record, banks=banks)
        if ttl_s is not None:
            kept.record = replace(kept.record, ttl_s=ttl_s)
        if pinned is not None:
            kept.record = replace(kept.record, pinned=pinned)
        self._keep(kept)
        return kept.record

    async def begin(
        self, tenant: str, session_id: str, *, holder: str, lease_s: float, instead_of: str = ""
    ) -> SessionRecord:
        kept = self._find(tenant, session_id)
        if kept.holder not in ("", holder, instead_of) and self._now() < kept.lease_ends_s:
            raise SessionBusy(f"another call holds session {session_id}", kept.holder)
        if holder in kept.gone or holder == kept.committed_by:
            raise SessionBusy(f"this call on session {session_id} is over")
        kept.holder, kept.lease_ends_s = holder, self._now() + lease_s
        kept.record = replace(kept.record, last_used_ms=self._now_ms())
        self._keep(kept)
        return kept.record

    async def renew(self, tenant: str, session_id: str, *, holder: str, lease_s: float) -> None:
        kept = self._find(tenant, session_id)
        self._check_lease(kept, holder)
        kept.lease_ends_s = self._now() + lease_s
        self._keep(kept)

    async def commit(
        self,
        before: SessionRecord,
        *,
        holder: str,
        new_tokens: Sequence[int],
        turn: TurnRecord,
        model: str,
        worker_id: str,
    ) -> None:
        kept = self._find(before.tenant, before.session_id)
        if kept.record.version == before.version + 1 and kept.committed_by == holder:
            return  # already
        self._check_lease(kept, holder)
        record = kept.record
        if record.version != before.version:
            raise SessionBusy(f"another call has just changed session {record.session_id}")
        kept.record = replace(
            record,
            version=record.version + 1,
            model=model,
            worker_id=worker_id,
            last_used_ms=self._now_ms(),
            turns=(*record.turns, turn),
            token_ids=(*record.token_ids, *new_tokens),
            num_tokens=record.num_tokens + len(new_tokens),
        )
        kept.committed_by, kept.holder = holder, ""
        self._keep(kept)

    async def release(self, tenant: str, session_id: str, *, holder: str) -> None:
        kept = self._alive((tenant, session_id))
        if kept is None:
            return
        now_s = self._now()
        kept.gone = {name: until_s for name, until_s in kept.gone.items() if now_s < until_s}
        kept.gone[holder] = now_s + _GONE_S
        if kept.holder == holder:
            kept.holder = ""

    async def delete(self, tenant: str, session_id: str) -> SessionRecord:
        record = self._find(tenant, session_id).record
        del self._kept[tenant, session_id]
        return record

    async def usage(self, tenant: str) -> Usage:
        alive = [self._alive(key) for key in list(self._kept) if key[0] == tenant]
        tokens = [kept.record.num_tokens for kept in alive if kept is not None]
        return Usage(len(tokens), sum(tokens))

    async def recount(self, tenant: str) -> Usage:
        return await self.usage(tenant)

    async def keep_alive(self, front: str, for_s: float) -> None:
        self._alive_until_s[front] = self._now() + for_s

    async def is_alive(self, front: str) -> bool:
        return self._now() < self._alive_until_s.get(front, 0.0)

    async def info(self) -> ServerInfo:
        return ServerInfo(used_bytes=0, max_bytes=0, evicted_keys=0, eviction_policy="noeviction")

    async def available(self) -> bool:
        return True

    async def aclose(self) -> None:
        self._kept.clear()

    @staticmethod
    def _check(quota: Quota, usage: Usage, more_tokens: int) -> None:
        if quota.sessions and usage.sessions >= quota.sessions:
            raise LimitReached("max_sessions", quota.sessions)
        if quota.tokens and more_tokens and usage.tokens + more_tokens > quota.tokens:
            raise LimitReached("max_tokens", quota.tokens)

    def _now_ms(self) -> int:
        return int(self._now() * 1000)

    def _keep(self, kept: _Kept) -> None:
        for_ever = kept.record.pinned or kept.record.ttl_s == 0
        kept.expires_s = float("inf") if for_ever else self._now() + kept.record.ttl_s

    def _check_lease(self, kept: _Kept, holder: str) -> None:
        if kept.holder != holder or self._now() >= kept.lease_ends_s:
            raise SessionBusy(f"the lease on session {kept.record.session_id} is another's, or has run out")

    def _alive(self, key: tuple[str, str]) -> _Kept | None:
        kept = self._kept.get(key)
        if kept is not None and self._now() >= kept.expires_s:
            del self._kept[key]
            return None
        return kept

    def _find(self, tenant: str, session_id: str) -> _Kept:
        kept = self._alive((tenant, session_id))
        if kept is None:
            raise SessionNotFound(f"there is no session {session_id}")
        return kept


def _parse(page_token: str) -> tuple[int, str]:
    created_ms, slash, session_id = page_token.partition("/")
    if not slash or not created_ms.isdecimal():
        raise InvalidRequest("page_token", "is not one that ListSessions gave")
    return int(created_ms), session_id
