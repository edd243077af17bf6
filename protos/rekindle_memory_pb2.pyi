from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EntryKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENTRY_KIND_UNSPECIFIED: _ClassVar[EntryKind]
    ENTRY_KIND_FACT: _ClassVar[EntryKind]
    ENTRY_KIND_DOCUMENT: _ClassVar[EntryKind]
    ENTRY_KIND_EPISODE: _ClassVar[EntryKind]
    ENTRY_KIND_SUMMARY: _ClassVar[EntryKind]
ENTRY_KIND_UNSPECIFIED: EntryKind
ENTRY_KIND_FACT: EntryKind
ENTRY_KIND_DOCUMENT: EntryKind
ENTRY_KIND_EPISODE: EntryKind
ENTRY_KIND_SUMMARY: EntryKind

class Bank(_message.Message):
    __slots__ = ("name", "description", "created_ms", "entries", "documents", "embedder", "embedding_dim", "version", "settings")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    CREATED_MS_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDER_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_DIM_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    name: str
    description: str
    created_ms: int
    entries: int
    documents: int
    embedder: str
    embedding_dim: int
    version: int
    settings: BankSettings
    def __init__(self, name: _Optional[str] = ..., description: _Optional[str] = ..., created_ms: _Optional[int] = ..., entries: _Optional[int] = ..., documents: _Optional[int] = ..., embedder: _Optional[str] = ..., embedding_dim: _Optional[int] = ..., version: _Optional[int] = ..., settings: _Optional[_Union[BankSettings, _Mapping]] = ...) -> None: ...

class BankSettings(_message.Message):
    __slots__ = ("chunk_tokens", "overlap_tokens", "relevance_weight", "recency_weight", "importance_weight", "diversity", "read_tokens", "read_entries", "delete_after_s", "write_facts", "write_summary_tokens", "kv_ttl_s")
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RELEVANCE_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    RECENCY_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    IMPORTANCE_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    DIVERSITY_FIELD_NUMBER: _ClassVar[int]
    READ_TOKENS_FIELD_NUMBER: _ClassVar[int]
    READ_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    DELETE_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    WRITE_FACTS_FIELD_NUMBER: _ClassVar[int]
    WRITE_SUMMARY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_TTL_S_FIELD_NUMBER: _ClassVar[int]
    chunk_tokens: int
    overlap_tokens: int
    relevance_weight: float
    recency_weight: float
    importance_weight: float
    diversity: float
    read_tokens: int
    read_entries: int
    delete_after_s: int
    write_facts: int
    write_summary_tokens: int
    kv_ttl_s: int
    def __init__(self, chunk_tokens: _Optional[int] = ..., overlap_tokens: _Optional[int] = ..., relevance_weight: _Optional[float] = ..., recency_weight: _Optional[float] = ..., importance_weight: _Optional[float] = ..., diversity: _Optional[float] = ..., read_tokens: _Optional[int] = ..., read_entries: _Optional[int] = ..., delete_after_s: _Optional[int] = ..., write_facts: _Optional[int] = ..., write_summary_tokens: _Optional[int] = ..., kv_ttl_s: _Optional[int] = ...) -> None: ...

class CreateBankRequest(_message.Message):
    __slots__ = ("name", "description", "settings")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    name: str
    description: str
    settings: BankSettings
    def __init__(self, name: _Optional[str] = ..., description: _Optional[str] = ..., settings: _Optional[_Union[BankSettings, _Mapping]] = ...) -> None: ...

class GetBankRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ListBanksRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListBanksResponse(_message.Message):
    __slots__ = ("banks", "next_page_token")
    BANKS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    banks: _containers.RepeatedCompositeFieldContainer[Bank]
    next_page_token: str
    def __init__(self, banks: _Optional[_Iterable[_Union[Bank, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeleteBankRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteBankResponse(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: int
    def __init__(self, entries: _Optional[int] = ...) -> None: ...

class MemoryEntry(_message.Message):
    __slots__ = ("id", "text", "kind", "metadata", "importance", "created_ms", "last_recalled_ms", "recalls", "document_id", "chunk", "superseded_by", "session_id", "turn")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    IMPORTANCE_FIELD_NUMBER: _ClassVar[int]
    CREATED_MS_FIELD_NUMBER: _ClassVar[int]
    LAST_RECALLED_MS_FIELD_NUMBER: _ClassVar[int]
    RECALLS_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_ID_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SUPERSEDED_BY_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TURN_FIELD_NUMBER: _ClassVar[int]
    id: str
    text: str
    kind: EntryKind
    metadata: _containers.ScalarMap[str, str]
    importance: float
    created_ms: int
    last_recalled_ms: int
    recalls: int
    document_id: str
    chunk: int
    superseded_by: str
    session_id: str
    turn: int
    def __init__(self, id: _Optional[str] = ..., text: _Optional[str] = ..., kind: _Optional[_Union[EntryKind, str]] = ..., metadata: _Optional[_Mapping[str, str]] = ..., importance: _Optional[float] = ..., created_ms: _Optional[int] = ..., last_recalled_ms: _Optional[int] = ..., recalls: _Optional[int] = ..., document_id: _Optional[str] = ..., chunk: _Optional[int] = ..., superseded_by: _Optional[str] = ..., session_id: _Optional[str] = ..., turn: _Optional[int] = ...) -> None: ...

class RememberRequest(_message.Message):
    __slots__ = ("bank", "text", "metadata", "importance", "supersedes")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    BANK_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    IMPORTANCE_FIELD_NUMBER: _ClassVar[int]
    SUPERSEDES_FIELD_NUMBER: _ClassVar[int]
    bank: str
    text: str
    metadata: _containers.ScalarMap[str, str]
    importance: float
    supersedes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, bank: _Optional[str] = ..., text: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ..., importance: _Optional[float] = ..., supersedes: _Optional[_Iterable[str]] = ...) -> None: ...

class Document(_message.Message):
    __slots__ = ("id", "text", "metadata", "importance")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    IMPORTANCE_FIELD_NUMBER: _ClassVar[int]
    id: str
    text: str
    metadata: _containers.ScalarMap[str, str]
    importance: float
    def __init__(self, id: _Optional[str] = ..., text: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ..., importance: _Optional[float] = ...) -> None: ...

class PutDocumentsRequest(_message.Message):
    __slots__ = ("bank", "documents")
    BANK_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    bank: str
    documents: _containers.RepeatedCompositeFieldContainer[Document]
    def __init__(self, bank: _Optional[str] = ..., documents: _Optional[_Iterable[_Union[Document, _Mapping]]] = ...) -> None: ...

class PutDocumentsProgress(_message.Message):
    __slots__ = ("document_id", "documents_done", "documents_in_all", "chunks", "new_chunks", "prefilled_chunks")
    DOCUMENT_ID_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_DONE_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_IN_ALL_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    NEW_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    PREFILLED_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    document_id: str
    documents_done: int
    documents_in_all: int
    chunks: int
    new_chunks: int
    prefilled_chunks: int
    def __init__(self, document_id: _Optional[str] = ..., documents_done: _Optional[int] = ..., documents_in_all: _Optional[int] = ..., chunks: _Optional[int] = ..., new_chunks: _Optional[int] = ..., prefilled_chunks: _Optional[int] = ...) -> None: ...

class EntryFilter(_message.Message):
    __slots__ = ("metadata", "kinds", "created_after_ms", "created_before_ms", "document_id", "session_id", "not_session_id")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    METADATA_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    CREATED_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    CREATED_BEFORE_MS_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NOT_SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    metadata: _containers.ScalarMap[str, str]
    kinds: _containers.RepeatedScalarFieldContainer[EntryKind]
    created_after_ms: int
    created_before_ms: int
    document_id: str
    session_id: str
    not_session_id: str
    def __init__(self, metadata: _Optional[_Mapping[str, str]] = ..., kinds: _Optional[_Iterable[_Union[EntryKind, str]]] = ..., created_after_ms: _Optional[int] = ..., created_before_ms: _Optional[int] = ..., document_id: _Optional[str] = ..., session_id: _Optional[str] = ..., not_session_id: _Optional[str] = ...) -> None: ...

class RecallRequest(_message.Message):
    __slots__ = ("bank", "query", "k", "filter", "with_superseded", "peek")
    BANK_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    WITH_SUPERSEDED_FIELD_NUMBER: _ClassVar[int]
    PEEK_FIELD_NUMBER: _ClassVar[int]
    bank: str
    query: str
    k: int
    filter: EntryFilter
    with_superseded: bool
    peek: bool
    def __init__(self, bank: _Optional[str] = ..., query: _Optional[str] = ..., k: _Optional[int] = ..., filter: _Optional[_Union[EntryFilter, _Mapping]] = ..., with_superseded: _Optional[bool] = ..., peek: _Optional[bool] = ...) -> None: ...

class RecallResponse(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[RecalledEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[RecalledEntry, _Mapping]]] = ...) -> None: ...

class RecalledEntry(_message.Message):
    __slots__ = ("entry", "score", "cosine", "bm25", "relevance", "retention")
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    COSINE_FIELD_NUMBER: _ClassVar[int]
    BM25_FIELD_NUMBER: _ClassVar[int]
    RELEVANCE_FIELD_NUMBER: _ClassVar[int]
    RETENTION_FIELD_NUMBER: _ClassVar[int]
    entry: MemoryEntry
    score: float
    cosine: float
    bm25: float
    relevance: float
    retention: float
    def __init__(self, entry: _Optional[_Union[MemoryEntry, _Mapping]] = ..., score: _Optional[float] = ..., cosine: _Optional[float] = ..., bm25: _Optional[float] = ..., relevance: _Optional[float] = ..., retention: _Optional[float] = ...) -> None: ...

class ForgetRequest(_message.Message):
    __slots__ = ("bank", "ids", "filter", "unused_for_s")
    BANK_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    UNUSED_FOR_S_FIELD_NUMBER: _ClassVar[int]
    bank: str
    ids: _containers.RepeatedScalarFieldContainer[str]
    filter: EntryFilter
    unused_for_s: int
    def __init__(self, bank: _Optional[str] = ..., ids: _Optional[_Iterable[str]] = ..., filter: _Optional[_Union[EntryFilter, _Mapping]] = ..., unused_for_s: _Optional[int] = ...) -> None: ...

class ForgetResponse(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: int
    def __init__(self, entries: _Optional[int] = ...) -> None: ...

class ExportBankRequest(_message.Message):
    __slots__ = ("bank", "with_vectors")
    BANK_FIELD_NUMBER: _ClassVar[int]
    WITH_VECTORS_FIELD_NUMBER: _ClassVar[int]
    bank: str
    with_vectors: bool
    def __init__(self, bank: _Optional[str] = ..., with_vectors: _Optional[bool] = ...) -> None: ...

class JsonLines(_message.Message):
    __slots__ = ("lines",)
    LINES_FIELD_NUMBER: _ClassVar[int]
    lines: bytes
    def __init__(self, lines: _Optional[bytes] = ...) -> None: ...

class ImportBankRequest(_message.Message):
    __slots__ = ("bank", "lines")
    BANK_FIELD_NUMBER: _ClassVar[int]
    LINES_FIELD_NUMBER: _ClassVar[int]
    bank: str
    lines: bytes
    def __init__(self, bank: _Optional[str] = ..., lines: _Optional[bytes] = ...) -> None: ...

class ImportBankResponse(_message.Message):
    __slots__ = ("entries", "new_entries")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    NEW_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: int
    new_entries: int
    def __init__(self, entries: _Optional[int] = ..., new_entries: _Optional[int] = ...) -> None: ...

class ReembedRequest(_message.Message):
    __slots__ = ("bank",)
    BANK_FIELD_NUMBER: _ClassVar[int]
    bank: str
    def __init__(self, bank: _Optional[str] = ...) -> None: ...

class ReembedProgress(_message.Message):
    __slots__ = ("entries_done", "entries_in_all")
    ENTRIES_DONE_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_IN_ALL_FIELD_NUMBER: _ClassVar[int]
    entries_done: int
    entries_in_all: int
    def __init__(self, entries_done: _Optional[int] = ..., entries_in_all: _Optional[int] = ...) -> None: ...
