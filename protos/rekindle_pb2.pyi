from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OnFailure(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ON_FAILURE_DISCARD: _ClassVar[OnFailure]
    ON_FAILURE_COMMIT: _ClassVar[OnFailure]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_EOS: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_INTERRUPTED: _ClassVar[FinishReason]

class ContextPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONTEXT_POLICY_UNSPECIFIED: _ClassVar[ContextPolicy]
    CONTEXT_POLICY_ERROR: _ClassVar[ContextPolicy]
    CONTEXT_POLICY_WINDOW: _ClassVar[ContextPolicy]
    CONTEXT_POLICY_RECALL: _ClassVar[ContextPolicy]

class BankMissReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BANK_MISS_REASON_UNSPECIFIED: _ClassVar[BankMissReason]
    BANK_MISS_REASON_TOKENS: _ClassVar[BankMissReason]
    BANK_MISS_REASON_LATE: _ClassVar[BankMissReason]
    BANK_MISS_REASON_STALE: _ClassVar[BankMissReason]
    BANK_MISS_REASON_FAILED: _ClassVar[BankMissReason]

class PlanKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PLAN_KIND_UNSPECIFIED: _ClassVar[PlanKind]
    PLAN_KIND_LOAD: _ClassVar[PlanKind]
    PLAN_KIND_COMPUTE: _ClassVar[PlanKind]
    PLAN_KIND_BOTH_ENDS: _ClassVar[PlanKind]

class MissReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MISS_REASON_UNSPECIFIED: _ClassVar[MissReason]
    MISS_REASON_NEW: _ClassVar[MissReason]
    MISS_REASON_ABSENT: _ClassVar[MissReason]
    MISS_REASON_CORRUPT: _ClassVar[MissReason]
    MISS_REASON_FOREIGN: _ClassVar[MissReason]
    MISS_REASON_LATE: _ClassVar[MissReason]
    MISS_REASON_UNAVAILABLE: _ClassVar[MissReason]
    MISS_REASON_NO_ROOM: _ClassVar[MissReason]
    MISS_REASON_TAIL: _ClassVar[MissReason]
    MISS_REASON_FASTER: _ClassVar[MissReason]

class BankAccess(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BANK_ACCESS_UNSPECIFIED: _ClassVar[BankAccess]
    BANK_ACCESS_READ: _ClassVar[BankAccess]
    BANK_ACCESS_WRITE: _ClassVar[BankAccess]
    BANK_ACCESS_READ_WRITE: _ClassVar[BankAccess]

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_DEVICE: _ClassVar[Tier]
    TIER_HOST: _ClassVar[Tier]
    TIER_REDIS: _ClassVar[Tier]
    TIER_DISK: _ClassVar[Tier]
ON_FAILURE_DISCARD: OnFailure
ON_FAILURE_COMMIT: OnFailure
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_EOS: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_INTERRUPTED: FinishReason
CONTEXT_POLICY_UNSPECIFIED: ContextPolicy
CONTEXT_POLICY_ERROR: ContextPolicy
CONTEXT_POLICY_WINDOW: ContextPolicy
CONTEXT_POLICY_RECALL: ContextPolicy
BANK_MISS_REASON_UNSPECIFIED: BankMissReason
BANK_MISS_REASON_TOKENS: BankMissReason
BANK_MISS_REASON_LATE: BankMissReason
BANK_MISS_REASON_STALE: BankMissReason
BANK_MISS_REASON_FAILED: BankMissReason
PLAN_KIND_UNSPECIFIED: PlanKind
PLAN_KIND_LOAD: PlanKind
PLAN_KIND_COMPUTE: PlanKind
PLAN_KIND_BOTH_ENDS: PlanKind
MISS_REASON_UNSPECIFIED: MissReason
MISS_REASON_NEW: MissReason
MISS_REASON_ABSENT: MissReason
MISS_REASON_CORRUPT: MissReason
MISS_REASON_FOREIGN: MissReason
MISS_REASON_LATE: MissReason
MISS_REASON_UNAVAILABLE: MissReason
MISS_REASON_NO_ROOM: MissReason
MISS_REASON_TAIL: MissReason
MISS_REASON_FASTER: MissReason
BANK_ACCESS_UNSPECIFIED: BankAccess
BANK_ACCESS_READ: BankAccess
BANK_ACCESS_WRITE: BankAccess
BANK_ACCESS_READ_WRITE: BankAccess
TIER_UNSPECIFIED: Tier
TIER_DEVICE: Tier
TIER_HOST: Tier
TIER_REDIS: Tier
TIER_DISK: Tier

class GenerateRequest(_message.Message):
    __slots__ = ("session_id", "text", "chat", "tokens", "sampling", "audit", "on_failure", "idempotency_key")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    AUDIT_FIELD_NUMBER: _ClassVar[int]
    ON_FAILURE_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    text: str
    chat: ChatInput
    tokens: TokenInput
    sampling: Sampling
    audit: bool
    on_failure: OnFailure
    idempotency_key: str
    def __init__(self, session_id: _Optional[str] = ..., text: _Optional[str] = ..., chat: _Optional[_Union[ChatInput, _Mapping]] = ..., tokens: _Optional[_Union[TokenInput, _Mapping]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., audit: _Optional[bool] = ..., on_failure: _Optional[_Union[OnFailure, str]] = ..., idempotency_key: _Optional[str] = ...) -> None: ...

class ChatInput(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class TokenInput(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "stop", "stop_token_ids", "ignore_eos", "logprobs")
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    logprobs: int
    def __init__(self, max_new_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., logprobs: _Optional[int] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("delta", "finished")
    DELTA_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    delta: Delta
    finished: Finished
    def __init__(self, delta: _Optional[_Union[Delta, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("text", "token_ids", "logprobs")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("logprob", "top")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    def __init__(self, logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("reason", "usage", "receipt", "turn", "stop_string", "stop_token_id", "seed", "repeated")
    REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    TURN_FIELD_NUMBER: _ClassVar[int]
    STOP_STRING_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    REPEATED_FIELD_NUMBER: _ClassVar[int]
    reason: FinishReason
    usage: Usage
    receipt: Receipt
    turn: int
    stop_string: str
    stop_token_id: int
    seed: int
    repeated: bool
    def __init__(self, reason: _Optional[_Union[FinishReason, str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ..., turn: _Optional[int] = ..., stop_string: _Optional[str] = ..., stop_token_id: _Optional[int] = ..., seed: _Optional[int] = ..., repeated: _Optional[bool] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens", "input_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    input_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., input_tokens: _Optional[int] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("device_tokens", "host_tokens", "redis_tokens", "computed_tokens", "misses", "restored_bytes", "queue_ms", "restore_ms", "prefill_ms", "decode_ms", "ttft_ms", "worker_id", "audit", "plan", "disk_tokens", "context", "memories", "bank_misses", "insert_bounds")
    DEVICE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HOST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REDIS_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    RESTORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    RESTORE_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_MS_FIELD_NUMBER: _ClassVar[int]
    DECODE_MS_FIELD_NUMBER: _ClassVar[int]
    TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    AUDIT_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    DISK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    MEMORIES_FIELD_NUMBER: _ClassVar[int]
    BANK_MISSES_FIELD_NUMBER: _ClassVar[int]
    INSERT_BOUNDS_FIELD_NUMBER: _ClassVar[int]
    device_tokens: int
    host_tokens: int
    redis_tokens: int
    computed_tokens: int
    misses: _containers.RepeatedCompositeFieldContainer[Miss]
    restored_bytes: int
    queue_ms: float
    restore_ms: float
    prefill_ms: float
    decode_ms: float
    ttft_ms: float
    worker_id: str
    audit: Audit
    plan: RestorePlan
    disk_tokens: int
    context: ContextReceipt
    memories: _containers.RepeatedCompositeFieldContainer[MemorySource]
    bank_misses: _containers.RepeatedCompositeFieldContainer[BankMiss]
    insert_bounds: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, device_tokens: _Optional[int] = ..., host_tokens: _Optional[int] = ..., redis_tokens: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., misses: _Optional[_Iterable[_Union[Miss, _Mapping]]] = ..., restored_bytes: _Optional[int] = ..., queue_ms: _Optional[float] = ..., restore_ms: _Optional[float] = ..., prefill_ms: _Optional[float] = ..., decode_ms: _Optional[float] = ..., ttft_ms: _Optional[float] = ..., worker_id: _Optional[str] = ..., audit: _Optional[_Union[Audit, _Mapping]] = ..., plan: _Optional[_Union[RestorePlan, _Mapping]] = ..., disk_tokens: _Optional[int] = ..., context: _Optional[_Union[ContextReceipt, _Mapping]] = ..., memories: _Optional[_Iterable[_Union[MemorySource, _Mapping]]] = ..., bank_misses: _Optional[_Iterable[_Union[BankMiss, _Mapping]]] = ..., insert_bounds: _Optional[_Iterable[int]] = ...) -> None: ...

class ContextReceipt(_message.Message):
    __slots__ = ("policy", "left_tokens", "choices", "recalled_tokens", "recalled_starts", "unit_tokens")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    LEFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    RECALLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECALLED_STARTS_FIELD_NUMBER: _ClassVar[int]
    UNIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    policy: ContextPolicy
    left_tokens: int
    choices: int
    recalled_tokens: int
    recalled_starts: _containers.RepeatedScalarFieldContainer[int]
    unit_tokens: int
    def __init__(self, policy: _Optional[_Union[ContextPolicy, str]] = ..., left_tokens: _Optional[int] = ..., choices: _Optional[int] = ..., recalled_tokens: _Optional[int] = ..., recalled_starts: _Optional[_Iterable[int]] = ..., unit_tokens: _Optional[int] = ...) -> None: ...

class MemorySource(_message.Message):
    __slots__ = ("bank", "entry_id", "score", "document_id", "tokens")
    BANK_FIELD_NUMBER: _ClassVar[int]
    ENTRY_ID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    bank: str
    entry_id: str
    score: float
    document_id: str
    tokens: int
    def __init__(self, bank: _Optional[str] = ..., entry_id: _Optional[str] = ..., score: _Optional[float] = ..., document_id: _Optional[str] = ..., tokens: _Optional[int] = ...) -> None: ...

class BankMiss(_message.Message):
    __slots__ = ("bank", "reason")
    BANK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    bank: str
    reason: BankMissReason
    def __init__(self, bank: _Optional[str] = ..., reason: _Optional[_Union[BankMissReason, str]] = ...) -> None: ...

class RestorePlan(_message.Message):
    __slots__ = ("kind", "predicted_ms", "actual_ms", "computed_instead_tokens")
    KIND_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_MS_FIELD_NUMBER: _ClassVar[int]
    ACTUAL_MS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_INSTEAD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    kind: PlanKind
    predicted_ms: float
    actual_ms: float
    computed_instead_tokens: int
    def __init__(self, kind: _Optional[_Union[PlanKind, str]] = ..., predicted_ms: _Optional[float] = ..., actual_ms: _Optional[float] = ..., computed_instead_tokens: _Optional[int] = ...) -> None: ...

class Audit(_message.Message):
    __slots__ = ("tokens", "agreeing_tokens", "mean_kl", "max_kl", "nll_drift", "passed")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    AGREEING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MEAN_KL_FIELD_NUMBER: _ClassVar[int]
    MAX_KL_FIELD_NUMBER: _ClassVar[int]
    NLL_DRIFT_FIELD_NUMBER: _ClassVar[int]
    PASSED_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    agreeing_tokens: int
    mean_kl: float
    max_kl: float
    nll_drift: float
    passed: bool
    def __init__(self, tokens: _Optional[int] = ..., agreeing_tokens: _Optional[int] = ..., mean_kl: _Optional[float] = ..., max_kl: _Optional[float] = ..., nll_drift: _Optional[float] = ..., passed: _Optional[bool] = ...) -> None: ...

class Miss(_message.Message):
    __slots__ = ("reason", "tokens")
    REASON_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    reason: MissReason
    tokens: int
    def __init__(self, reason: _Optional[_Union[MissReason, str]] = ..., tokens: _Optional[int] = ...) -> None: ...

class Session(_message.Message):
    __slots__ = ("session_id", "model", "num_tokens", "turns", "token_ids", "created_ms", "last_used_ms", "ttl_s", "pinned", "version", "parent_session_id", "parent_turn", "residency", "text", "codec", "context_policy", "banks")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CREATED_MS_FIELD_NUMBER: _ClassVar[int]
    LAST_USED_MS_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PARENT_SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    PARENT_TURN_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_POLICY_FIELD_NUMBER: _ClassVar[int]
    BANKS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    model: str
    num_tokens: int
    turns: _containers.RepeatedCompositeFieldContainer[Turn]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    created_ms: int
    last_used_ms: int
    ttl_s: int
    pinned: bool
    version: int
    parent_session_id: str
    parent_turn: int
    residency: _containers.RepeatedCompositeFieldContainer[Residency]
    text: str
    codec: str
    context_policy: ContextPolicy
    banks: _containers.RepeatedCompositeFieldContainer[BankAttachment]
    def __init__(self, session_id: _Optional[str] = ..., model: _Optional[str] = ..., num_tokens: _Optional[int] = ..., turns: _Optional[_Iterable[_Union[Turn, _Mapping]]] = ..., token_ids: _Optional[_Iterable[int]] = ..., created_ms: _Optional[int] = ..., last_used_ms: _Optional[int] = ..., ttl_s: _Optional[int] = ..., pinned: _Optional[bool] = ..., version: _Optional[int] = ..., parent_session_id: _Optional[str] = ..., parent_turn: _Optional[int] = ..., residency: _Optional[_Iterable[_Union[Residency, _Mapping]]] = ..., text: _Optional[str] = ..., codec: _Optional[str] = ..., context_policy: _Optional[_Union[ContextPolicy, str]] = ..., banks: _Optional[_Iterable[_Union[BankAttachment, _Mapping]]] = ...) -> None: ...

class BankAttachment(_message.Message):
    __slots__ = ("bank", "access")
    BANK_FIELD_NUMBER: _ClassVar[int]
    ACCESS_FIELD_NUMBER: _ClassVar[int]
    bank: str
    access: BankAccess
    def __init__(self, bank: _Optional[str] = ..., access: _Optional[_Union[BankAccess, str]] = ...) -> None: ...

class Turn(_message.Message):
    __slots__ = ("number", "start", "reply_start", "end", "reason", "committed_ms", "idempotency_key")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    REPLY_START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_MS_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    number: int
    start: int
    reply_start: int
    end: int
    reason: FinishReason
    committed_ms: int
    idempotency_key: str
    def __init__(self, number: _Optional[int] = ..., start: _Optional[int] = ..., reply_start: _Optional[int] = ..., end: _Optional[int] = ..., reason: _Optional[_Union[FinishReason, str]] = ..., committed_ms: _Optional[int] = ..., idempotency_key: _Optional[str] = ...) -> None: ...

class Residency(_message.Message):
    __slots__ = ("tier", "worker_id", "tokens")
    TIER_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    worker_id: str
    tokens: int
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., worker_id: _Optional[str] = ..., tokens: _Optional[int] = ...) -> None: ...

class CreateSessionRequest(_message.Message):
    __slots__ = ("session_id", "ttl_s", "pinned", "codec", "context_policy", "banks")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_POLICY_FIELD_NUMBER: _ClassVar[int]
    BANKS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    ttl_s: int
    pinned: bool
    codec: str
    context_policy: ContextPolicy
    banks: _containers.RepeatedCompositeFieldContainer[BankAttachment]
    def __init__(self, session_id: _Optional[str] = ..., ttl_s: _Optional[int] = ..., pinned: _Optional[bool] = ..., codec: _Optional[str] = ..., context_policy: _Optional[_Union[ContextPolicy, str]] = ..., banks: _Optional[_Iterable[_Union[BankAttachment, _Mapping]]] = ...) -> None: ...

class GetSessionRequest(_message.Message):
    __slots__ = ("session_id", "with_token_ids", "with_text", "with_residency", "user_is_typing")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    WITH_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    WITH_TEXT_FIELD_NUMBER: _ClassVar[int]
    WITH_RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    USER_IS_TYPING_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    with_token_ids: bool
    with_text: bool
    with_residency: bool
    user_is_typing: bool
    def __init__(self, session_id: _Optional[str] = ..., with_token_ids: _Optional[bool] = ..., with_text: _Optional[bool] = ..., with_residency: _Optional[bool] = ..., user_is_typing: _Optional[bool] = ...) -> None: ...

class ListSessionsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListSessionsResponse(_message.Message):
    __slots__ = ("sessions", "next_page_token")
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[Session]
    next_page_token: str
    def __init__(self, sessions: _Optional[_Iterable[_Union[Session, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class UpdateSessionRequest(_message.Message):
    __slots__ = ("session_id", "ttl_s", "pinned", "banks")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    BANKS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    ttl_s: int
    pinned: bool
    banks: BankAttachments
    def __init__(self, session_id: _Optional[str] = ..., ttl_s: _Optional[int] = ..., pinned: _Optional[bool] = ..., banks: _Optional[_Union[BankAttachments, _Mapping]] = ...) -> None: ...

class BankAttachments(_message.Message):
    __slots__ = ("banks",)
    BANKS_FIELD_NUMBER: _ClassVar[int]
    banks: _containers.RepeatedCompositeFieldContainer[BankAttachment]
    def __init__(self, banks: _Optional[_Iterable[_Union[BankAttachment, _Mapping]]] = ...) -> None: ...

class ForkSessionRequest(_message.Message):
    __slots__ = ("session_id", "at_turn", "new_session_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    AT_TURN_FIELD_NUMBER: _ClassVar[int]
    NEW_SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    at_turn: int
    new_session_id: str
    def __init__(self, session_id: _Optional[str] = ..., at_turn: _Optional[int] = ..., new_session_id: _Optional[str] = ...) -> None: ...

class ParkSessionRequest(_message.Message):
    __slots__ = ("session_id", "drop_host")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    DROP_HOST_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    drop_host: bool
    def __init__(self, session_id: _Optional[str] = ..., drop_host: _Optional[bool] = ...) -> None: ...

class ParkSessionResponse(_message.Message):
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

class WarmSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class WarmSessionResponse(_message.Message):
    __slots__ = ("worker_id", "device_tokens", "restored_tokens")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESTORED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    device_tokens: int
    restored_tokens: int
    def __init__(self, worker_id: _Optional[str] = ..., device_tokens: _Optional[int] = ..., restored_tokens: _Optional[int] = ...) -> None: ...

class DeleteSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class DeleteSessionResponse(_message.Message):
    __slots__ = ("tokens", "device_blocks", "host_blocks", "redis_blocks", "disk_blocks")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REDIS_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DISK_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    device_blocks: int
    host_blocks: int
    redis_blocks: int
    disk_blocks: int
    def __init__(self, tokens: _Optional[int] = ..., device_blocks: _Optional[int] = ..., host_blocks: _Optional[int] = ..., redis_blocks: _Optional[int] = ..., disk_blocks: _Optional[int] = ...) -> None: ...

class EraseTenantRequest(_message.Message):
    __slots__ = ("tenant",)
    TENANT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    def __init__(self, tenant: _Optional[str] = ...) -> None: ...

class EraseTenantResponse(_message.Message):
    __slots__ = ("sessions", "tokens", "device_blocks", "host_blocks", "redis_blocks", "disk_blocks", "banks", "entries")
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REDIS_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DISK_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BANKS_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    sessions: int
    tokens: int
    device_blocks: int
    host_blocks: int
    redis_blocks: int
    disk_blocks: int
    banks: int
    entries: int
    def __init__(self, sessions: _Optional[int] = ..., tokens: _Optional[int] = ..., device_blocks: _Optional[int] = ..., host_blocks: _Optional[int] = ..., redis_blocks: _Optional[int] = ..., disk_blocks: _Optional[int] = ..., banks: _Optional[int] = ..., entries: _Optional[int] = ...) -> None: ...

class GetCacheStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CacheStats(_message.Message):
    __slots__ = ("prompt_tokens", "hit_rate", "device_hit_rate", "host_hit_rate", "redis_hit_rate", "workers", "redis", "disk_hit_rate")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HIT_RATE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_HIT_RATE_FIELD_NUMBER: _ClassVar[int]
    HOST_HIT_RATE_FIELD_NUMBER: _ClassVar[int]
    REDIS_HIT_RATE_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    REDIS_FIELD_NUMBER: _ClassVar[int]
    DISK_HIT_RATE_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: TokensBySource
    hit_rate: float
    device_hit_rate: float
    host_hit_rate: float
    redis_hit_rate: float
    workers: _containers.RepeatedCompositeFieldContainer[WorkerCacheStats]
    redis: RedisStats
    disk_hit_rate: float
    def __init__(self, prompt_tokens: _Optional[_Union[TokensBySource, _Mapping]] = ..., hit_rate: _Optional[float] = ..., device_hit_rate: _Optional[float] = ..., host_hit_rate: _Optional[float] = ..., redis_hit_rate: _Optional[float] = ..., workers: _Optional[_Iterable[_Union[WorkerCacheStats, _Mapping]]] = ..., redis: _Optional[_Union[RedisStats, _Mapping]] = ..., disk_hit_rate: _Optional[float] = ...) -> None: ...

class TokensBySource(_message.Message):
    __slots__ = ("device", "host", "redis", "computed", "disk")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    REDIS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_FIELD_NUMBER: _ClassVar[int]
    DISK_FIELD_NUMBER: _ClassVar[int]
    device: int
    host: int
    redis: int
    computed: int
    disk: int
    def __init__(self, device: _Optional[int] = ..., host: _Optional[int] = ..., redis: _Optional[int] = ..., computed: _Optional[int] = ..., disk: _Optional[int] = ...) -> None: ...

class WorkerCacheStats(_message.Message):
    __slots__ = ("worker_id", "model", "prompt_tokens", "device", "host", "stores_dropped", "evicted_then_needed", "running", "waiting", "block_tokens", "disk", "device_used_blocks")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    STORES_DROPPED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_THEN_NEEDED_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DISK_FIELD_NUMBER: _ClassVar[int]
    DEVICE_USED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    model: str
    prompt_tokens: TokensBySource
    device: TierStats
    host: TierStats
    stores_dropped: int
    evicted_then_needed: int
    running: int
    waiting: int
    block_tokens: int
    disk: TierStats
    device_used_blocks: int
    def __init__(self, worker_id: _Optional[str] = ..., model: _Optional[str] = ..., prompt_tokens: _Optional[_Union[TokensBySource, _Mapping]] = ..., device: _Optional[_Union[TierStats, _Mapping]] = ..., host: _Optional[_Union[TierStats, _Mapping]] = ..., stores_dropped: _Optional[int] = ..., evicted_then_needed: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., block_tokens: _Optional[int] = ..., disk: _Optional[_Union[TierStats, _Mapping]] = ..., device_used_blocks: _Optional[int] = ...) -> None: ...

class TierStats(_message.Message):
    __slots__ = ("blocks", "capacity_blocks", "bytes", "capacity_bytes")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    capacity_blocks: int
    bytes: int
    capacity_bytes: int
    def __init__(self, blocks: _Optional[int] = ..., capacity_blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., capacity_bytes: _Optional[int] = ...) -> None: ...

class RedisStats(_message.Message):
    __slots__ = ("available", "used_bytes", "max_bytes", "evicted_keys", "eviction_policy")
    AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    EVICTED_KEYS_FIELD_NUMBER: _ClassVar[int]
    EVICTION_POLICY_FIELD_NUMBER: _ClassVar[int]
    available: bool
    used_bytes: int
    max_bytes: int
    evicted_keys: int
    eviction_policy: str
    def __init__(self, available: _Optional[bool] = ..., used_bytes: _Optional[int] = ..., max_bytes: _Optional[int] = ..., evicted_keys: _Optional[int] = ..., eviction_policy: _Optional[str] = ...) -> None: ...
