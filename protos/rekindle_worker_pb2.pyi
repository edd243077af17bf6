from protos import rekindle_pb2 as _rekindle_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class History(_message.Message):
    __slots__ = ("tenant", "token_ids", "codec", "context_policy", "turn_bounds", "insert_bounds")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_POLICY_FIELD_NUMBER: _ClassVar[int]
    TURN_BOUNDS_FIELD_NUMBER: _ClassVar[int]
    INSERT_BOUNDS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    codec: str
    context_policy: _rekindle_pb2.ContextPolicy
    turn_bounds: _containers.RepeatedScalarFieldContainer[int]
    insert_bounds: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tenant: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., codec: _Optional[str] = ..., context_policy: _Optional[_Union[_rekindle_pb2.ContextPolicy, str]] = ..., turn_bounds: _Optional[_Iterable[int]] = ..., insert_bounds: _Optional[_Iterable[int]] = ...) -> None: ...

class WorkerGenerateRequest(_message.Message):
    __slots__ = ("request_id", "session_id", "history", "text", "chat", "tokens", "sampling", "block_ttl_s", "audit", "begun", "inserts", "tokens_inserted", "device_only")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TTL_S_FIELD_NUMBER: _ClassVar[int]
    AUDIT_FIELD_NUMBER: _ClassVar[int]
    BEGUN_FIELD_NUMBER: _ClassVar[int]
    INSERTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_INSERTED_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ONLY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    session_id: str
    history: History
    text: str
    chat: _rekindle_pb2.ChatInput
    tokens: _rekindle_pb2.TokenInput
    sampling: _rekindle_pb2.Sampling
    block_ttl_s: int
    audit: bool
    begun: Begun
    inserts: _containers.RepeatedScalarFieldContainer[str]
    tokens_inserted: _containers.RepeatedScalarFieldContainer[int]
    device_only: bool
    def __init__(self, request_id: _Optional[str] = ..., session_id: _Optional[str] = ..., history: _Optional[_Union[History, _Mapping]] = ..., text: _Optional[str] = ..., chat: _Optional[_Union[_rekindle_pb2.ChatInput, _Mapping]] = ..., tokens: _Optional[_Union[_rekindle_pb2.TokenInput, _Mapping]] = ..., sampling: _Optional[_Union[_rekindle_pb2.Sampling, _Mapping]] = ..., block_ttl_s: _Optional[int] = ..., audit: _Optional[bool] = ..., begun: _Optional[_Union[Begun, _Mapping]] = ..., inserts: _Optional[_Iterable[str]] = ..., tokens_inserted: _Optional[_Iterable[int]] = ..., device_only: _Optional[bool] = ...) -> None: ...

class Begun(_message.Message):
    __slots__ = ("token_ids", "text_characters")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_CHARACTERS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text_characters: int
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., text_characters: _Optional[int] = ...) -> None: ...

class WorkerEvent(_message.Message):
    __slots__ = ("started", "delta", "finished")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    started: Started
    delta: _rekindle_pb2.Delta
    finished: _rekindle_pb2.Finished
    def __init__(self, started: _Optional[_Union[Started, _Mapping]] = ..., delta: _Optional[_Union[_rekindle_pb2.Delta, _Mapping]] = ..., finished: _Optional[_Union[_rekindle_pb2.Finished, _Mapping]] = ...) -> None: ...

class Started(_message.Message):
    __slots__ = ("input_token_ids", "insert_bounds")
    INPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    INSERT_BOUNDS_FIELD_NUMBER: _ClassVar[int]
    input_token_ids: _containers.RepeatedScalarFieldContainer[int]
    insert_bounds: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, input_token_ids: _Optional[_Iterable[int]] = ..., insert_bounds: _Optional[_Iterable[int]] = ...) -> None: ...

class ParkRequest(_message.Message):
    __slots__ = ("history", "drop_host", "block_ttl_s")
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    DROP_HOST_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TTL_S_FIELD_NUMBER: _ClassVar[int]
    history: History
    drop_host: bool
    block_ttl_s: int
    def __init__(self, history: _Optional[_Union[History, _Mapping]] = ..., drop_host: _Optional[bool] = ..., block_ttl_s: _Optional[int] = ...) -> None: ...

class ParkReply(_message.Message):
    __slots__ = ("redis_tokens", "device_blocks_dropped", "host_blocks_dropped", "bytes_stored")
    REDIS_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BLOCKS_DROPPED_FIELD_NUMBER: _ClassVar[int]
    HOST_BLOCKS_DROPPED_FIELD_NUMBER: _ClassVar[int]
    BYTES_STORED_FIELD_NUMBER: _ClassVar[int]
    redis_tokens: int
    device_blocks_dropped: int
    host_blocks_dropped: int
    bytes_stored: int
    def __init__(self, redis_tokens: _Optional[int] = ..., device_blocks_dropped: _Optional[int] = ..., host_blocks_dropped: _Optional[int] = ..., bytes_stored: _Optional[int] = ...) -> None: ...

class WarmRequest(_message.Message):
    __slots__ = ("history",)
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    history: History
    def __init__(self, history: _Optional[_Union[History, _Mapping]] = ...) -> None: ...

class WarmReply(_message.Message):
    __slots__ = ("device_tokens", "restored_tokens")
    DEVICE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESTORED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    device_tokens: int
    restored_tokens: int
    def __init__(self, device_tokens: _Optional[int] = ..., restored_tokens: _Optional[int] = ...) -> None: ...

class FlushRequest(_message.Message):
    __slots__ = ("history",)
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    history: History
    def __init__(self, history: _Optional[_Union[History, _Mapping]] = ...) -> None: ...

class FlushReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LocateRequest(_message.Message):
    __slots__ = ("history", "with_redis")
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    WITH_REDIS_FIELD_NUMBER: _ClassVar[int]
    history: History
    with_redis: bool
    def __init__(self, history: _Optional[_Union[History, _Mapping]] = ..., with_redis: _Optional[bool] = ...) -> None: ...

class LocateReply(_message.Message):
    __slots__ = ("device_tokens", "host_tokens", "redis_tokens", "disk_tokens")
    DEVICE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HOST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REDIS_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DISK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    device_tokens: int
    host_tokens: int
    redis_tokens: int
    disk_tokens: int
    def __init__(self, device_tokens: _Optional[int] = ..., host_tokens: _Optional[int] = ..., redis_tokens: _Optional[int] = ..., disk_tokens: _Optional[int] = ...) -> None: ...

class DropRequest(_message.Message):
    __slots__ = ("history", "with_redis")
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    WITH_REDIS_FIELD_NUMBER: _ClassVar[int]
    history: History
    with_redis: bool
    def __init__(self, history: _Optional[_Union[History, _Mapping]] = ..., with_redis: _Optional[bool] = ...) -> None: ...

class DropReply(_message.Message):
    __slots__ = ("device_blocks", "host_blocks", "redis_blocks", "disk_blocks")
    DEVICE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REDIS_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DISK_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    device_blocks: int
    host_blocks: int
    redis_blocks: int
    disk_blocks: int
    def __init__(self, device_blocks: _Optional[int] = ..., host_blocks: _Optional[int] = ..., redis_blocks: _Optional[int] = ..., disk_blocks: _Optional[int] = ...) -> None: ...

class EraseRequest(_message.Message):
    __slots__ = ("tenant", "with_redis")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    WITH_REDIS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    with_redis: bool
    def __init__(self, tenant: _Optional[str] = ..., with_redis: _Optional[bool] = ...) -> None: ...

class RetainRequest(_message.Message):
    __slots__ = ("history", "block_ttl_s")
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TTL_S_FIELD_NUMBER: _ClassVar[int]
    history: History
    block_ttl_s: int
    def __init__(self, history: _Optional[_Union[History, _Mapping]] = ..., block_ttl_s: _Optional[int] = ...) -> None: ...

class RetainReply(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    def __init__(self, blocks: _Optional[int] = ...) -> None: ...

class DetokenizeRequest(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class DetokenizeReply(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class QuoteRequest(_message.Message):
    __slots__ = ("texts",)
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, texts: _Optional[_Iterable[str]] = ...) -> None: ...

class QuoteReply(_message.Message):
    __slots__ = ("texts",)
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedCompositeFieldContainer[QuotedText]
    def __init__(self, texts: _Optional[_Iterable[_Union[QuotedText, _Mapping]]] = ...) -> None: ...

class QuotedText(_message.Message):
    __slots__ = ("text", "tokens")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    text: str
    tokens: int
    def __init__(self, text: _Optional[str] = ..., tokens: _Optional[int] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("tenant", "codec", "texts", "block_ttl_s")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TTL_S_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    codec: str
    texts: _containers.RepeatedScalarFieldContainer[str]
    block_ttl_s: int
    def __init__(self, tenant: _Optional[str] = ..., codec: _Optional[str] = ..., texts: _Optional[_Iterable[str]] = ..., block_ttl_s: _Optional[int] = ...) -> None: ...

class DropPrefilledRequest(_message.Message):
    __slots__ = ("tenant", "texts", "with_redis")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    WITH_REDIS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    texts: _containers.RepeatedScalarFieldContainer[str]
    with_redis: bool
    def __init__(self, tenant: _Optional[str] = ..., texts: _Optional[_Iterable[str]] = ..., with_redis: _Optional[bool] = ...) -> None: ...

class PrefillReply(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("worker_id", "model", "fingerprint", "max_context_tokens", "block_tokens", "accepting", "metrics_address", "block_bytes", "names_from", "embedder", "embedding_dim")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTING_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    NAMES_FROM_FIELD_NUMBER: _ClassVar[int]
    EMBEDDER_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_DIM_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    model: str
    fingerprint: str
    max_context_tokens: int
    block_tokens: int
    accepting: bool
    metrics_address: str
    block_bytes: int
    names_from: bytes
    embedder: str
    embedding_dim: int
    def __init__(self, worker_id: _Optional[str] = ..., model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., max_context_tokens: _Optional[int] = ..., block_tokens: _Optional[int] = ..., accepting: _Optional[bool] = ..., metrics_address: _Optional[str] = ..., block_bytes: _Optional[int] = ..., names_from: _Optional[bytes] = ..., embedder: _Optional[str] = ..., embedding_dim: _Optional[int] = ...) -> None: ...

class EmbedRequest(_message.Message):
    __slots__ = ("texts", "chunk_tokens", "overlap_tokens", "is_query")
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IS_QUERY_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    chunk_tokens: int
    overlap_tokens: int
    is_query: bool
    def __init__(self, texts: _Optional[_Iterable[str]] = ..., chunk_tokens: _Optional[int] = ..., overlap_tokens: _Optional[int] = ..., is_query: _Optional[bool] = ...) -> None: ...

class EmbedReply(_message.Message):
    __slots__ = ("embedder", "texts")
    EMBEDDER_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    embedder: str
    texts: _containers.RepeatedCompositeFieldContainer[EmbeddedText]
    def __init__(self, embedder: _Optional[str] = ..., texts: _Optional[_Iterable[_Union[EmbeddedText, _Mapping]]] = ...) -> None: ...

class EmbeddedText(_message.Message):
    __slots__ = ("chunks",)
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    chunks: _containers.RepeatedCompositeFieldContainer[EmbeddedChunk]
    def __init__(self, chunks: _Optional[_Iterable[_Union[EmbeddedChunk, _Mapping]]] = ...) -> None: ...

class EmbeddedChunk(_message.Message):
    __slots__ = ("start", "end", "tokens", "vector", "is_cut")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    IS_CUT_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    tokens: int
    vector: bytes
    is_cut: bool
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ..., tokens: _Optional[int] = ..., vector: _Optional[bytes] = ..., is_cut: _Optional[bool] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BlockEvents(_message.Message):
    __slots__ = ("number", "is_snapshot", "device_stored", "device_removed", "host_stored", "host_removed", "load")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    IS_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    DEVICE_STORED_FIELD_NUMBER: _ClassVar[int]
    DEVICE_REMOVED_FIELD_NUMBER: _ClassVar[int]
    HOST_STORED_FIELD_NUMBER: _ClassVar[int]
    HOST_REMOVED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    number: int
    is_snapshot: bool
    device_stored: bytes
    device_removed: bytes
    host_stored: bytes
    host_removed: bytes
    load: Load
    def __init__(self, number: _Optional[int] = ..., is_snapshot: _Optional[bool] = ..., device_stored: _Optional[bytes] = ..., device_removed: _Optional[bytes] = ..., host_stored: _Optional[bytes] = ..., host_removed: _Optional[bytes] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("queue_s", "token_s", "host_byte_s", "redis_byte_s")
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTE_S_FIELD_NUMBER: _ClassVar[int]
    REDIS_BYTE_S_FIELD_NUMBER: _ClassVar[int]
    queue_s: float
    token_s: float
    host_byte_s: float
    redis_byte_s: float
    def __init__(self, queue_s: _Optional[float] = ..., token_s: _Optional[float] = ..., host_byte_s: _Optional[float] = ..., redis_byte_s: _Optional[float] = ...) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
