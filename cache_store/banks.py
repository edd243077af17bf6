"""A bank of knowledge and its entries, and what the front end asks of the place that keeps them. No Redis here.

A bank counts its changes. Who has seen all up to one of them asks for those that came after it, and has then the same
bank as the store: that is how front ends keep in memory what they search. How often an entry was recalled is no change.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cache_store.errors import EmbedderChanged, InvalidRequest

Vector = NDArray[np.float32]
"""[dim], of unit length."""

_NAME = re.compile(r"[A-Za-z0-9._:-]{1,128}")
DEFAULT_MAX_ENTRIES: Final = 1_000_000


class EntryKind(IntEnum):
    """protos' EntryKind."""

    FACT = 1
    """By Remember, or written by the served model of a turn."""
    DOCUMENT = 2
    """A chunk of a document."""
    EPISODE = 3
    """What was said in a turn."""
    SUMMARY = 4
    """Of a turn, written by the served model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BankSettings:
    """Raises InvalidRequest for what can't be."""

    chunk_tokens: int = 128
    overlap_tokens: int = 16
    """Of documents, in the embedder's tokens; how many of them a chunk repeats of the one before."""
    relevance_weight: float = 1.0
    recency_weight: float = 0.1
    importance_weight: float = 0.25
    diversity: float = 0.9
    """Maximal marginal relevance: 1 looks at the score alone, 0 at the difference from what is chosen already."""
    read_tokens: int = 512
    read_entries: int = 8
    """What is put in front of a turn's input, at most."""
    delete_after_s: int = 0
    """Entries that were not recalled for so long are deleted; 0: never."""
    write_facts: int = 0
    write_summary_tokens: int = 0
    """What the served model writes of a turn, at most; 0: it is not asked."""

    def __post_init__(self) -> None:
        _within("chunk_tokens", self.chunk_tokens, 16, 4096)
        _within("overlap_tokens", self.overlap_tokens, 0, self.chunk_tokens // 2)
        for weight in ("relevance_weight", "recency_weight", "importance_weight"):
            _within(weight, getattr(self, weight), 0.0, 10.0)
        _within("diversity", self.diversity, 0.0, 1.0)
        _within("read_tokens", self.read_tokens, 0, 8192)
        _within("read_entries", self.read_entries, 0, 100)
        _within("delete_after_s", self.delete_after_s, 0, 10 * 365 * 86_400)
        _within("write_facts", self.write_facts, 0, 32)
        _within("write_summary_tokens", self.write_summary_tokens, 16 if self.write_summary_tokens else 0, 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class BankRecord:
    """A bank, without its entries."""

    tenant: str
    name: str
    description: str
    created_ms: int
    settings: BankSettings
    entries: int = 0
    documents: int = 0
    embedder: str = ""
    embedding_dim: int = 0
    """Of the embedding model that made its vectors: its digest, and how many numbers each has. None before the first
    entry."""
    version: int = 0
    """Counts changes."""
    incarnation: str = ""
    """By which a bank is told from an earlier one of the same name. The store's own."""
    has_vector_set: bool = False
    """Its store can say which entries are near a vector."""

    def check_embedder(self, embedder: str) -> None:
        """Raises EmbedderChanged, unless vectors of this embedding model can be compared with the bank's."""
        if self.entries and self.embedder != embedder:
            raise EmbedderChanged(self.name, self.embedder, embedder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    id: str
    """Made from the bank, the kind, the text, the metadata and the place in a document."""
    text: str
    kind: EntryKind
    metadata: Mapping[str, str] = field(default_factory=dict)
    importance: float = 0.5
    created_ms: int
    last_recalled_ms: int = 0
    """0: never."""
    recalls: int = 0
    document_id: str = ""
    chunk: int = 0
    """Of the document, from 0."""
    document_digest: str = ""
    """Of the content of all of the document: `plain_name`."""
    superseded_by: str = ""
    """The later entry that says otherwise; empty while it stands."""
    session_id: str = ""
    turn: int = 0


@dataclass(frozen=True, slots=True)
class EntryFilter:
    """An entry passes if all that is set is true of it."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    """All of them must be equal."""
    kinds: frozenset[EntryKind] = frozenset()
    created_after_ms: int = 0
    """At or after."""
    created_before_ms: int = 0
    document_id: str = ""
    session_id: str = ""
    not_session_id: str = ""
    """Of any other session, or of none."""

    @property
    def is_empty(self) -> bool:
        return self == EntryFilter()


class BankPage(NamedTuple):
    records: list[BankRecord]
    """By name."""
    next_token: str
    """Empty on the last page."""


class Kept(NamedTuple):
    """An entry with its vector."""

    entry: Entry
    vector: Vector


class Use(NamedTuple):
    """How often an entry was recalled, and when last (Unix time in ms; 0: never)."""

    recalls: int
    last_ms: int


class Supersession(NamedTuple):
    """From now on the one entry loses to the other."""

    loser: str
    winner: str


class Seen(NamedTuple):
    """How far a reader has read a bank."""

    incarnation: str = ""
    embedder: str = ""
    version: int = 0
    """It has read the changes up to this one."""
    begun_at: int = 0
    """The bank's version when it began to read them, or when it had last read all."""


class Changes(NamedTuple):
    bank: BankRecord
    seen: Seen
    """To ask for what follows."""
    from_nothing: bool
    """What was read before is no good: it was another bank, its vectors were others, or what has gone since then is no
    longer known."""
    kept: list[Kept]
    gone: list[str]
    is_last: bool
    """The reader now has what the bank had a moment ago."""


class Committed(NamedTuple):
    new_entries: int
    missing: list[str]
    """Chunks that are not there, or no longer: nothing was changed."""


class BankStore(Protocol):
    """Banks by tenant and name. Every call may raise StoreUnavailable, those that write StoreFull, and those that read
    RecordUnreadable: what is kept was changed, or there is no key for it.

    A call that is given a `bank` raises BankNotFound where that one is gone, whatever is there under its name now.
    """

    def name_of(self, tenant: str, bank: str, *parts: str) -> str:
        """A name for these parts: 32 hex digits, always the same. Where values are sealed nobody can tell what of."""
        ...

    async def create(self, record: BankRecord) -> BankRecord:
        """Returns it with its incarnation. Raises BankExists."""
        ...

    async def get(self, tenant: str, name: str) -> BankRecord:
        """Raises BankNotFound."""
        ...

    async def page(self, tenant: str, *, page_size: int, page_token: str) -> BankPage:
        """Raises InvalidRequest for a page token that is not one of ours."""
        ...

    async def delete(self, tenant: str, name: str) -> int:
        """Forget a bank with its entries; say how many they were. Raises BankNotFound."""
        ...

    async def erase(self, tenant: str) -> int:
        """Forget all banks of a tenant; say how many entries they had."""
        ...

    async def add(
        self,
        bank: BankRecord,
        kept: Sequence[Kept],
        *,
        embedder: str,
        supersedes: Sequence[Supersession] = (),
        stands: str = "",
        max_entries: int = DEFAULT_MAX_ENTRIES,
    ) -> list[bool]:
        """Keep what is not there yet; say which were new. All of it or nothing.

        The first entry of a bank says which embedder it has. The entry `stands` stands again if it had lost. Raises
        EmbedderChanged, BankFull, and EntriesMissing where one that loses or wins is not there.
        """
        ...

    async def stage(self, bank: BankRecord, kept: Sequence[Kept], *, embedder: str, max_entries: int) -> None:
        """Put down chunks of a document that nobody sees before `commit_document`. They go after an hour without it.

        Raises EmbedderChanged, BankFull.
        """
        ...

    async def commit_document(self, bank: BankRecord, document_id: str, digest: str, ids: Sequence[str]) -> Committed:
        """Have these chunks, all at once, instead of those that the document had."""
        ...

    async def has_document(self, bank: BankRecord, document_id: str, digest: str) -> bool:
        """Whether it is there with this content, whole."""
        ...

    async def changes(self, tenant: str, name: str, seen: Seen, *, most: int) -> Changes:
        """What has changed, the oldest `most` of it. One round trip. Raises BankNotFound."""
        ...

    async def entries(self, bank: BankRecord, ids: Sequence[str]) -> list[Entry | None]:
        """In the order asked, with None where one is gone."""
        ...

    async def vectors(self, bank: BankRecord, ids: Sequence[str]) -> list[Vector | None]:
        """The same. Raises EmbedderChanged where the bank has another embedder by now."""
        ...

    async def near(self, bank: BankRecord, vector: Vector, most: int) -> list[str]:
        """Ids of entries near the vector, nearly all of the nearest: of a bank that has a vector set."""
        ...

    async def uses(self, bank: BankRecord, ids: Sequence[str]) -> list[Use]: ...

    async def add_uses(self, bank: BankRecord, uses: Mapping[str, Use]) -> None:
        """Count so many recalls more, and when the last of them was. Harmless for entries that are gone."""
        ...

    async def remove(self, bank: BankRecord, entries: Sequence[Entry], *, unused_since_ms: int = 0) -> list[str]:
        """Delete entries; return which were there. Who lost to one of them loses to who it lost to, or stands again.

        With `unused_since_ms` those that were recalled since then stay.
        """
        ...

    async def begin_reembed(self, bank: BankRecord, embedder: str) -> None:
        """From now on `put_vectors` takes this embedder's; those of another that were begun are dropped."""
        ...

    async def put_vectors(self, bank: BankRecord, embedder: str, vectors: Mapping[str, Vector]) -> None:
        """Put down vectors that nobody sees before `finish_reembed`. Raises EmbedderChanged for another's."""
        ...

    async def finish_reembed(self, bank: BankRecord, embedder: str, dim: int, *, at_version: int) -> bool:
        """Have those vectors instead of what the bank had, if nothing has changed since this version.

        Raises EmbedderChanged where they are another embedder's by now.
        """
        ...

    async def available(self) -> bool:
        """One cheap round trip: does the store answer? Never raises."""
        ...

    async def aclose(self) -> None: ...


def check_bank_name(name: str, field_name: str = "name") -> str:
    """Return the name, or raise InvalidRequest naming the field."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(field_name, "must be 1 to 128 of A-Z a-z 0-9 . _ : -")
    return name


def plain_name(*parts: str) -> str:
    """A digest of these parts, 32 hex digits; no two lists of parts have the same."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part.encode()
        digest.update(len(content).to_bytes(4, "little") + content)
    return digest.hexdigest()


def _within(setting: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise InvalidRequest(f"settings.{setting}", f"must be {least:g} to {most:g}, got {value:g}")
