"""A bank's values as Redis keeps them: in the clear, or sealed. Knows what the scripts are given, and no Redis.

Sealed are the description and the settings of a bank, all of an entry but its id, and its vector, each for its place:
tenant, bank, incarnation, id, and for a vector its embedder. In the clear are ids, names of banks, when a bank was
made, who lost to whom, and how often an entry was recalled: who can write to Redis can delete entries, hide them or
make them strong, and can neither read one nor make one.
"""

import hashlib
import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Final, Protocol

import numpy as np

from cache_store.banks import BankRecord, BankSettings, Entry, EntryKind, Vector, plain_name
from cache_store.errors import InvalidRequest, RecordUnreadable
from cache_store.sealing import Keyring, KeyUnknown, Purpose, SealBroken

_PLAIN: Final = b"p"
_SEALED: Final = b"s"


class Envelope(Protocol):
    """Closes values for a tenant and a place, and names what must not show."""

    def close(self, tenant: str, content: bytes, place: bytes) -> bytes: ...

    def open(self, tenant: str, value: bytes, place: bytes) -> bytes:
        """Raises RecordUnreadable."""
        ...

    def name(self, *parts: str) -> str:
        """32 hex digits."""
        ...


class PlainEnvelope:
    def close(self, tenant: str, content: bytes, place: bytes) -> bytes:
        return _PLAIN + content

    def open(self, tenant: str, value: bytes, place: bytes) -> bytes:
        if value[:1] == _SEALED:
            raise RecordUnreadable("it is sealed, and there are no master keys here")
        if value[:1] != _PLAIN:
            raise RecordUnreadable("it is missing or damaged")
        return value[1:]

    def name(self, *parts: str) -> str:
        return plain_name(*parts)


class SealedEnvelope:
    """Reads what is in the clear too if the keyring says so; it stays as it is."""

    def __init__(self, keyring: Keyring) -> None:
        self._sealer = keyring.sealer(Purpose.BANKS)
        self._plain = PlainEnvelope() if keyring.takes_plain else None
        self._names = keyring.banks_from

    def close(self, tenant: str, content: bytes, place: bytes) -> bytes:
        return _SEALED + self._sealer.sealed(tenant, content, about=place)

    def open(self, tenant: str, value: bytes, place: bytes) -> bytes:
        if value[:1] != _SEALED:
            if self._plain is None:
                raise RecordUnreadable("it is missing or not sealed")
            return self._plain.open(tenant, value, place)
        try:
            return self._sealer.opened(tenant, value[1:], about=place)
        except KeyUnknown as error:
            raise RecordUnreadable(f"it is sealed {error}") from error
        except SealBroken as error:
            raise RecordUnreadable("it is not as it was sealed") from error

    def name(self, *parts: str) -> str:
        return hashlib.blake2b(plain_name(*parts).encode(), key=self._names, digest_size=16).hexdigest()


class BankFormat:
    """From records, entries and vectors to values, and back. What reads raises RecordUnreadable."""

    def __init__(self, envelope: Envelope) -> None:
        self._envelope = envelope
        self.name = envelope.name

    def about(self, record: BankRecord) -> bytes:
        content = json.dumps([record.description, asdict(record.settings)]).encode()
        return self._envelope.close(record.tenant, content, _place(record, "bank"))

    def read_meta(self, tenant: str, name: str, meta: dict[bytes, bytes], entries: int, documents: int) -> BankRecord:
        with _reading(f"bank {name}"):
            record = BankRecord(
                tenant=tenant,
                name=name,
                description="",
                settings=BankSettings(),
                created_ms=int(meta[b"created_ms"]),
                entries=entries,
                documents=documents,
                embedder=meta[b"embedder"].decode(),
                embedding_dim=int(meta[b"dim"]),
                version=int(meta[b"version"]),
                incarnation=meta[b"incarnation"].decode(),
                has_vector_set=meta.get(b"has_near") == b"1",
            )
            return self._with_about(record, meta[b"about"])

    def entry(self, bank: BankRecord, entry: Entry) -> bytes:
        """All that never changes."""
        fields = [
            entry.text,
            int(entry.kind),
            dict(entry.metadata),
            entry.importance,
            entry.created_ms,
            entry.document_id,
            entry.chunk,
            entry.document_digest,
            entry.session_id,
            entry.turn,
        ]
        content = json.dumps(fields, ensure_ascii=False).encode()
        return self._envelope.close(bank.tenant, content, _place(bank, "entry", entry.id))

    def read_entry(
        self, bank: BankRecord, entry_id: str, value: bytes, *, superseded_by: bytes, recalls: bytes, last_ms: bytes
    ) -> Entry:
        with _reading(f"entry {entry_id} of bank {bank.name}"):
            content = self._envelope.open(bank.tenant, value, _place(bank, "entry", entry_id))
            text, kind, metadata, importance, created_ms, document_id, chunk, digest, session_id, turn = json.loads(
                content
            )
            return Entry(
                id=entry_id,
                text=text,
                kind=EntryKind(kind),
                metadata=metadata,
                importance=importance,
                created_ms=created_ms,
                last_recalled_ms=int(last_ms or 0),
                recalls=int(recalls or 0),
                document_id=document_id,
                chunk=chunk,
                document_digest=digest,
                superseded_by=superseded_by.decode(),
                session_id=session_id,
                turn=turn,
            )

    def vector(self, bank: BankRecord, embedder: str, entry_id: str, vector: Vector) -> bytes:
        place = _place(bank, "vector", entry_id, embedder)
        return self._envelope.close(bank.tenant, vector.astype("<f4").tobytes(), place)

    def read_vector(self, bank: BankRecord, entry_id: str, value: bytes) -> Vector:
        with _reading(f"the vector of entry {entry_id} of bank {bank.name}"):
            content = self._envelope.open(bank.tenant, value, _place(bank, "vector", entry_id, bank.embedder))
            vector = np.frombuffer(content, "<f4")
            if len(vector) != bank.embedding_dim:
                raise ValueError(f"{len(vector)} numbers")
            return vector

    def _with_about(self, record: BankRecord, value: bytes) -> BankRecord:
        content = self._envelope.open(record.tenant, value, _place(record, "bank"))
        description, settings = json.loads(content)
        return replace(record, description=description, settings=BankSettings(**settings))


def _place(bank: BankRecord, what: str, *more: str) -> bytes:
    return json.dumps([what, bank.tenant, bank.name, bank.incarnation, *more]).encode()


@contextmanager
def _reading(what: str) -> Generator[None, None, None]:
    """Say what it is that can't be read."""
    try:
        yield
    except RecordUnreadable as error:
        raise RecordUnreadable(f"{what} can't be read: {error}") from error
    except (KeyError, ValueError, TypeError, InvalidRequest) as error:
        raise RecordUnreadable(f"{what} can't be read: it is damaged") from error
