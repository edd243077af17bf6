"""A session's durable record, and what the front end asks of the place that keeps it. No Redis here."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from cache_store.attachments import BankAttachment
from cache_store.codecs import RAW
from cache_store.errors import InvalidRequest
from cache_store.store import ServerInfo

_SESSION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class TurnMemory(NamedTuple):
    """An entry of a bank that a turn has read: protos' MemorySource."""

    bank: str
    entry_id: str
    score: float
    document_id: str
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRecord:
    """Tokens [start, reply_start) were the input of this turn, [reply_start, end) its reply."""

    start: int
    reply_start: int
    end: int
    finish_reason: int
    """protos' FinishReason."""
    committed_ms: int
    idempotency_key: str = ""
    """By which its caller can ask for it again; empty: there is none."""
    insert_bounds: tuple[int, ...] = ()
    """Of its input, what was inserted: start, end, start, end, ... (`cache_store/inserts.py`)."""
    lost_inserts: tuple[int, ...] = ()
    """Where inserts of earlier turns begin that are none any more: their KV was lost, and computed where they stand."""
    memories: tuple[TurnMemory, ...] = ()
    """What it has read, for who asks for it again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRecord:
    """An append-only list of token ids and what is known about it. `version` counts commits."""

    tenant: str
    session_id: str
    version: int
    model: str
    """Fingerprint (hex) of the model that served the last turn; empty before the first."""
    created_ms: int
    last_used_ms: int
    ttl_s: int
    """Seconds without use after which the record goes; 0: never."""
    pinned: bool
    worker_id: str
    """Who served the last turn; empty before the first. A hint for routing, never a promise."""
    codec: str = RAW.name
    """One of `cache_store.codecs.SESSION_CODECS`: part of the names of its blocks."""
    parent_session_id: str = ""
    parent_turn: int = 0
    context_policy: str = ""
    """What becomes of it beyond the model's window: "" (its turns are refused), "window" or "recall"."""
    banks: tuple[BankAttachment, ...] = ()
    turns: tuple[TurnRecord, ...] = ()
    token_ids: tuple[int, ...] = field(default=(), repr=False)
    num_tokens: int = 0
    """Length of the history. Listings give it without `token_ids`; a store fills it in on every read."""
    continuation: bytes = field(default=b"", repr=False, compare=False)
    """The store's own: what the commit that follows this read goes on from."""


def inserts_of(turns: Sequence[TurnRecord]) -> tuple[int, ...]:
    """What is inserted in a conversation of these turns, from its first."""
    ends: dict[int, int] = {}
    for turn in turns:
        for start in turn.lost_inserts:
            ends.pop(start, None)
        ends.update(zip(turn.insert_bounds[0::2], turn.insert_bounds[1::2], strict=True))
    return tuple(bound for insert in ends.items() for bound in insert)


class Page(NamedTuple):
    records: list[SessionRecord]
    """Newest first, without turns or tokens."""
    next_token: str
    """Empty on the last page."""


class Quota(NamedTuple):
    """What a tenant may keep; 0 is any number."""

    sessions: int = 0
    tokens: int = 0


class Usage(NamedTuple):
    """What a tenant keeps, at least: sessions that have expired may be counted for a while."""

    sessions: int
    tokens: int


NO_QUOTA = Quota()


class RecordStore(Protocol):
    """Session records by tenant and id. Every call may raise StoreUnavailable and, but for `create`, SessionNotFound.

    Who reads a record may get RecordUnreadable: it was changed, or there is no key for it. It is then not locked.
    A turn is `begin` (lock and read), then `commit` (append, compare-and-set on the version, unlock) or `release`.
    """

    async def create(self, record: SessionRecord, *, quota: Quota = NO_QUOTA) -> None:
        """Keep a new record, tokens and turns included (a fork brings its own). Raises SessionExists, and LimitReached
        where the tenant would have more than `quota`, however many create at once. (Commits have none: what has been
        said is kept.)"""
        ...

    async def usage(self, tenant: str) -> Usage:
        """One cheap read."""
        ...

    async def recount(self, tenant: str) -> Usage:
        """Look at every session, so that those that have expired are counted no longer."""
        ...

    async def get(self, tenant: str, session_id: str) -> SessionRecord: ...

    async def list(self, tenant: str, *, page_size: int, page_token: str) -> Page:
        """Raises InvalidRequest for a page token that is not one of ours."""
        ...

    async def update(
        self,
        tenant: str,
        session_id: str,
        *,
        ttl_s: int | None,
        pinned: bool | None,
        banks: tuple[BankAttachment, ...] | None = None,
    ) -> SessionRecord:
        """Change what is given. Raises SessionBusy for `banks` while the session is locked: its turn goes by what it
        has read."""
        ...

    async def begin(
        self, tenant: str, session_id: str, *, holder: str, lease_s: float, instead_of: str = ""
    ) -> SessionRecord:
        """Lock the session for `holder`, who is of this call alone, and read it.

        Raises SessionBusy while another holder's lease runs, unless that is `instead_of`, who is dead; and to a holder
        that has released or committed.
        """
        ...

    async def renew(self, tenant: str, session_id: str, *, holder: str, lease_s: float) -> None:
        """Prolong the lease. Raises SessionBusy if it was lost."""
        ...

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
        """Append the turn and unlock, all or nothing. Raises SessionBusy if the version or the lease moved."""
        ...

    async def release(self, tenant: str, session_id: str, *, holder: str) -> None:
        """Unlock without a commit, for good: this holder can't lock again, even if its `begin` is still on its way.

        Harmless when the lease is gone or another's. Never raises StoreUnavailable: it is then tried again behind the
        caller's back, until the store answers.
        """
        ...

    async def delete(self, tenant: str, session_id: str) -> SessionRecord:
        """Forget the record; return what it was. Raises RecordUnreadable where that can't be told: it is gone."""
        ...

    async def keep_alive(self, front: str, for_s: float) -> None:
        """This front end lives, it says, and will say so again within `for_s`; 0: it is gone."""
        ...

    async def is_alive(self, front: str) -> bool: ...

    async def info(self) -> ServerInfo:
        """Ask the store how full it is."""
        ...

    async def available(self) -> bool:
        """One cheap round trip: does the store answer? Never raises."""
        ...

    async def aclose(self) -> None: ...


def check_session_id(session_id: str, field_name: str = "session_id") -> str:
    """Return the id, or raise InvalidRequest naming the field."""
    if not _SESSION_ID.fullmatch(session_id):
        raise InvalidRequest(field_name, "must be 1 to 128 of A-Z a-z 0-9 . _ : -")
    return session_id
