"""A session's record as Redis keeps it: in the clear, or sealed. Knows what the scripts are given, and no Redis.

In the clear, tokens are one string and turns a list. Sealed, that list has *pieces*: what one commit added, its turns
and its tokens. Each piece is sealed for its place and for the piece before it; `seal`, a field of meta, for the last
piece and for all of meta that says what a record is. So nothing can be cut off, put in, or taken from another record or
from an earlier state of this one without being found out. That all of it is an earlier state, no record can tell.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np

from cache_store.attachments import BankAttachment, pack_banks, read_banks
from cache_store.codecs import RAW
from cache_store.errors import RecordUnreadable
from cache_store.records import SessionRecord, TurnMemory, TurnRecord
from cache_store.sealing import TAG_BYTES, KeyUnknown, SealBroken, Sealer

_TURN = struct.Struct("<IIIIq")  # start, reply_start, end, finish_reason, committed_ms; then the idempotency key,
_MORE = b"\0"  # and, where there are any, this and as JSON: bounds of inserts, lost ones, memories
_COUNT = struct.Struct("<I")
_LENGTH = struct.Struct("<H")
_MOST_LENGTH = 0xFFFF
_CONTINUATION = struct.Struct(f"<{TAG_BYTES}sI?")  # the last piece's tag, how many there are, whether one may follow
_NO_PIECE = bytes(TAG_BYTES)
_MOST_PIECES = 256
"""The commit that would make more of them makes one of all: who reads a record opens each piece."""


class Kept(NamedTuple):
    """What the scripts answer with."""

    meta: Mapping[bytes, bytes]
    tokens: bytes
    entries: Sequence[bytes]
    """Of the list `turns`."""


class Written(NamedTuple):
    """What the scripts are given to add, or to put in place of all tokens and entries."""

    tokens: bytes
    entries: list[bytes]
    num_tokens: int
    seal: bytes = b""
    """Field of meta; empty: there is none."""
    replaces: bool = False


class Attached(NamedTuple):
    """What an update of a session's banks writes to meta."""

    banks: str
    seal: bytes = b""
    """Empty: as it is."""


class RecordFormat(Protocol):
    def created(self, record: SessionRecord) -> Written: ...

    def committed(
        self, before: SessionRecord, *, new_tokens: Sequence[int], turn: TurnRecord, model: str
    ) -> Written: ...

    def attached(self, before: SessionRecord, banks: Sequence[BankAttachment]) -> Attached: ...

    def read(self, tenant: str, session_id: str, kept: Kept) -> SessionRecord:
        """Raises RecordUnreadable."""
        ...


class PlainFormat:
    def created(self, record: SessionRecord) -> Written:
        turns = [pack_turn(turn) for turn in record.turns]
        return Written(pack_tokens(record.token_ids), turns, len(record.token_ids))

    def committed(self, before: SessionRecord, *, new_tokens: Sequence[int], turn: TurnRecord, model: str) -> Written:
        return Written(pack_tokens(new_tokens), [pack_turn(turn)], before.num_tokens + len(new_tokens))

    def attached(self, before: SessionRecord, banks: Sequence[BankAttachment]) -> Attached:
        return Attached(pack_banks(banks))

    def read(self, tenant: str, session_id: str, kept: Kept) -> SessionRecord:
        if b"seal" in kept.meta:
            raise RecordUnreadable(f"the record of session {session_id} is sealed, and there are no master keys here")
        try:
            record = replace(
                read_meta(tenant, session_id, kept.meta),
                turns=tuple(read_turn(entry) for entry in kept.entries),
                token_ids=read_tokens(kept.tokens),
            )
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise RecordUnreadable(f"the record of session {session_id} is damaged") from error
        if len(record.token_ids) != record.num_tokens or (record.version and not record.turns):
            # A Redis that evicts whatever it likes takes one of a record's keys and leaves the others.
            raise RecordUnreadable(f"of the record of session {session_id} a part is missing")
        return record


class SealedFormat:
    def __init__(self, sealer: Sealer, *, takes_plain: bool) -> None:
        """With `takes_plain` records in the clear are read too; their next commit seals them."""
        self._sealer = sealer
        self._plain = PlainFormat() if takes_plain else None

    def created(self, record: SessionRecord) -> Written:
        return self._whole(record)

    def committed(self, before: SessionRecord, *, new_tokens: Sequence[int], turn: TurnRecord, model: str) -> Written:
        after = replace(before, version=before.version + 1, model=model, num_tokens=before.num_tokens + len(new_tokens))
        if before.continuation:
            link, place, goes_on = _CONTINUATION.unpack(before.continuation)
            if goes_on:
                piece = self._piece(after, [turn], new_tokens, place, link)
                return Written(b"", [piece], after.num_tokens, self._seal(after, piece[-TAG_BYTES:], place + 1))
        turns, tokens = (*before.turns, turn), (*before.token_ids, *new_tokens)
        return self._whole(replace(after, turns=turns, token_ids=tokens))._replace(replaces=True)

    def attached(self, before: SessionRecord, banks: Sequence[BankAttachment]) -> Attached:
        if not before.continuation:  # in the clear, as yet
            return Attached(pack_banks(banks))
        link, num_pieces, _ = _CONTINUATION.unpack(before.continuation)
        return Attached(pack_banks(banks), self._seal(replace(before, banks=tuple(banks)), link, num_pieces))

    def read(self, tenant: str, session_id: str, kept: Kept) -> SessionRecord:
        if b"seal" not in kept.meta:
            if self._plain is not None:
                return self._plain.read(tenant, session_id, kept)
            raise RecordUnreadable(f"the record of session {session_id} is not sealed")
        try:
            return self._opened(read_meta(tenant, session_id, kept.meta), kept)
        except KeyUnknown as error:
            raise RecordUnreadable(f"the record of session {session_id} is sealed {error}") from error
        except (SealBroken, ValueError, KeyError) as error:
            raise RecordUnreadable(f"the record of session {session_id} is not as it was sealed") from error

    def _whole(self, record: SessionRecord) -> Written:
        """All of a record in one piece, if there is anything in it."""
        pieces = []
        if record.turns or record.token_ids:
            pieces = [self._piece(record, record.turns, record.token_ids, 0, _NO_PIECE)]
        record = replace(record, num_tokens=len(record.token_ids))
        link = pieces[-1][-TAG_BYTES:] if pieces else _NO_PIECE
        return Written(b"", pieces, record.num_tokens, self._seal(record, link, len(pieces)))

    def _opened(self, record: SessionRecord, kept: Kept) -> SessionRecord:
        turns: list[TurnRecord] = []
        tokens = bytearray()
        link = _NO_PIECE
        for place, piece in enumerate(kept.entries):
            content = self._sealer.opened(record.tenant, piece, about=_about_piece(record, place, link))
            new_turns, new_tokens = _read_content(content)
            turns += new_turns
            tokens += new_tokens
            link = piece[-TAG_BYTES:]
        seal = kept.meta[b"seal"]
        if self._sealer.opened(record.tenant, seal, about=_about(record, len(kept.entries))) != link:
            raise SealBroken("the last piece is another one")
        is_current = all(self._sealer.is_current(value) for value in (seal, *kept.entries))
        goes_on = is_current and len(kept.entries) < _MOST_PIECES
        return replace(
            record,
            turns=tuple(turns),
            token_ids=read_tokens(bytes(tokens)),
            continuation=_CONTINUATION.pack(link, len(kept.entries), goes_on),
        )

    def _piece(
        self, record: SessionRecord, turns: Sequence[TurnRecord], tokens: Sequence[int], place: int, link: bytes
    ) -> bytes:
        packed = [pack_turn(turn) for turn in turns]
        counted = b"".join(_packed_length(len(turn)) + turn for turn in packed)
        content = _COUNT.pack(len(packed)) + counted + pack_tokens(tokens)
        return self._sealer.sealed(record.tenant, content, about=_about_piece(record, place, link))

    def _seal(self, record: SessionRecord, link: bytes, num_pieces: int) -> bytes:
        """`link` is of the last piece."""
        return self._sealer.sealed(record.tenant, link, about=_about(record, num_pieces))


def _about_piece(record: SessionRecord, place: int, link: bytes) -> bytes:
    return json.dumps(["piece", record.tenant, record.session_id, place, link.hex()]).encode()


def _about(record: SessionRecord, num_pieces: int) -> bytes:
    """All of meta but what says how long it is kept, when it was used and who served it last."""
    about = [
        "record",
        record.tenant,
        record.session_id,
        record.version,
        record.model,
        record.created_ms,
        record.codec,
        record.parent_session_id,
        record.parent_turn,
        record.num_tokens,
        num_pieces,
    ]
    if record.context_policy or record.banks:  # neither was there once: records without them are as they were
        about += [record.context_policy, pack_banks(record.banks)]
    return json.dumps(about).encode()


def _read_content(content: bytes) -> tuple[list[TurnRecord], bytes]:
    """A piece's turns, and its tokens as they were packed."""
    (count,), at = _COUNT.unpack_from(content), _COUNT.size
    turns = []
    for _ in range(count):
        (length,) = _LENGTH.unpack_from(content, at)
        at += _LENGTH.size
        if not length:
            (length,) = _COUNT.unpack_from(content, at)
            at += _COUNT.size
        turns.append(read_turn(content[at : at + length]))
        at += length
    return turns, content[at:]


def _packed_length(num_bytes: int) -> bytes:
    """Of a turn, which is never empty: 0 says that the length comes behind it."""
    return _LENGTH.pack(num_bytes) if num_bytes <= _MOST_LENGTH else _LENGTH.pack(0) + _COUNT.pack(num_bytes)


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    return np.asarray(token_ids, dtype="<u4").tobytes()


def read_tokens(packed: bytes) -> tuple[int, ...]:
    return tuple(np.frombuffer(packed, dtype="<u4").tolist())


def pack_turn(turn: TurnRecord) -> bytes:
    fixed = _TURN.pack(turn.start, turn.reply_start, turn.end, turn.finish_reason, turn.committed_ms)
    more = [turn.insert_bounds, turn.lost_inserts, turn.memories]
    return fixed + turn.idempotency_key.encode() + (_MORE + json.dumps(more).encode() if any(more) else b"")


def read_turn(packed: bytes) -> TurnRecord:
    start, reply_start, end, finish_reason, committed_ms = _TURN.unpack_from(packed)
    key, _, more = packed[_TURN.size :].partition(_MORE)
    bounds, lost, memories = json.loads(more or b"[[], [], []]")
    return TurnRecord(
        start=start,
        reply_start=reply_start,
        end=end,
        finish_reason=finish_reason,
        committed_ms=committed_ms,
        idempotency_key=key.decode(),
        insert_bounds=tuple(bounds),
        lost_inserts=tuple(lost),
        memories=tuple(TurnMemory(*memory) for memory in memories),
    )


def meta_fields(record: SessionRecord) -> dict[str, str | int]:
    return {
        "version": record.version,
        "model": record.model,
        "created_ms": record.created_ms,
        "last_used_ms": record.last_used_ms,
        "ttl_s": record.ttl_s,
        "pinned": int(record.pinned),
        "worker_id": record.worker_id,
        "codec": record.codec,
        "parent_session_id": record.parent_session_id,
        "parent_turn": record.parent_turn,
        "context_policy": record.context_policy,
        "banks": pack_banks(record.banks),
        "num_tokens": len(record.token_ids),
    }


def read_meta(tenant: str, session_id: str, meta: Mapping[bytes, bytes]) -> SessionRecord:
    """A record without turns and tokens. Raises ValueError and KeyError."""
    return SessionRecord(
        tenant=tenant,
        session_id=session_id,
        version=int(meta[b"version"]),
        model=meta[b"model"].decode(),
        created_ms=int(meta[b"created_ms"]),
        last_used_ms=int(meta[b"last_used_ms"]),
        ttl_s=int(meta[b"ttl_s"]),
        pinned=meta[b"pinned"] == b"1",
        worker_id=meta[b"worker_id"].decode(),
        codec=meta.get(b"codec", RAW.name.encode()).decode(),  # none in a record from before there was a choice
        parent_session_id=meta[b"parent_session_id"].decode(),
        parent_turn=int(meta[b"parent_turn"]),
        context_policy=meta.get(b"context_policy", b"").decode(),  # as above
        banks=read_banks(meta.get(b"banks", b"")),
        num_tokens=int(meta[b"num_tokens"]),
    )
