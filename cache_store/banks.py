"""A bank of knowledge and its entries: what they are, and which can be. Where they are kept, `bank_store` says."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, NamedTuple

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
    kv_ttl_s: int = 0
    """For how long KV of its entries is kept, computed once by itself and inserted into the turns that read them; 0:
    each turn computes what it reads."""

    def __post_init__(self) -> None:
        _within("chunk_tokens", self.chunk_tokens, 16, 4096)
        _within("overlap_tokens", self.overlap_tokens, 0, self.chunk_tokens // 2)
        for weight in ("relevance_weight", "recency_weight", "importance_weight"):
            _within(weight, getattr(self, weight), 0.0, 10.0)
        _within("diversity", self.diversity, 0.0, 1.0)
        _within("read_tokens", self.read_tokens, 0, 8192)
        _within("read_entries", self.read_entries, 0, 100)
        _within("delete_after_s", self.delete_after_s, 0, 10 * 365 * 86_400)
        _within("kv_ttl_s", self.kv_ttl_s, 0, 10 * 365 * 86_400)
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
