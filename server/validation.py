"""Refuse bad requests, naming the field. What only a worker can know (vocabulary, window) is the worker's to refuse."""

from collections.abc import Mapping, Sequence
from typing import Final

from cache_store.attachments import BankAccess, BankAttachment
from cache_store.banks import check_bank_name
from cache_store.codecs import SESSION_CODECS
from cache_store.errors import InvalidRequest
from cache_store.records import check_session_id
from protos import rekindle_pb2 as pb

MAX_TTL_S = 10 * 365 * 86_400
"""Ten years. More is meant as for ever, which is 0."""

MAX_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 50
CONTEXT_POLICIES: Final[Mapping[pb.ContextPolicy, str]] = {
    pb.CONTEXT_POLICY_UNSPECIFIED: "",
    pb.CONTEXT_POLICY_ERROR: "",
    pb.CONTEXT_POLICY_WINDOW: "window",
    pb.CONTEXT_POLICY_RECALL: "recall",
}
"""As records keep them,"""
CONTEXT_POLICY_OF: Final = {kept: policy for policy, kept in CONTEXT_POLICIES.items()}
"""and back: ERROR, not UNSPECIFIED."""
BANK_ACCESSES: Final[Mapping[pb.BankAccess, BankAccess]] = {
    pb.BANK_ACCESS_READ: BankAccess.READ,
    pb.BANK_ACCESS_WRITE: BankAccess.WRITE,
    pb.BANK_ACCESS_READ_WRITE: BankAccess.READ_WRITE,
}
_MAX_BANKS = 8
_MAX_TOKEN_ID = 2**31 - 1
_MAX_STOPS = 16
_MAX_STOP_CHARACTERS = 256
_MAX_LOGPROBS = 20


def check_generate(request: pb.GenerateRequest) -> None:
    """Raise InvalidRequest for what no worker could serve. (An unknown session is found out later.)"""
    given = request.WhichOneof("input")
    if given is None:
        raise InvalidRequest("input", "one of text, chat and tokens must be set")
    if given == "text" and not request.text:
        raise InvalidRequest("text", "must not be empty")
    if given == "chat":
        _check_chat(request.chat)
    if given == "tokens":
        if not request.tokens.token_ids:
            raise InvalidRequest("tokens.token_ids", "must not be empty")
        _check_token_ids("tokens.token_ids", request.tokens.token_ids)
    if request.idempotency_key:
        if not request.session_id:
            raise InvalidRequest("idempotency_key", "is of a session's turn; session_id is not set")
        check_session_id(request.idempotency_key, "idempotency_key")
    _check_sampling(request.sampling)


def check_ttl(ttl_s: int) -> int:
    if ttl_s > MAX_TTL_S:
        raise InvalidRequest("ttl_s", f"must be at most {MAX_TTL_S}; 0 is for ever")
    return ttl_s


def check_codec(codec: str) -> str:
    """A codec that a session may choose, or nothing."""
    if codec and codec not in SESSION_CODECS:
        raise InvalidRequest("codec", f"must be one of {', '.join(SESSION_CODECS)}, got {codec!r}")
    return codec


def check_context_policy(policy: pb.ContextPolicy) -> str:
    """A policy as records keep it."""
    if policy not in CONTEXT_POLICIES:
        raise InvalidRequest("context_policy", f"there is none of number {policy}")
    return CONTEXT_POLICIES[policy]


def check_banks(banks: Sequence[pb.BankAttachment]) -> tuple[BankAttachment, ...]:
    """Attachments as records keep them. Whether there are such banks is found out later."""
    if len(banks) > _MAX_BANKS:
        raise InvalidRequest("banks", f"at most {_MAX_BANKS} can be attached, got {len(banks)}")
    names: set[str] = set()
    for number, attached in enumerate(banks):
        check_bank_name(attached.bank, f"banks[{number}].bank")
        if attached.bank in names:
            raise InvalidRequest(f"banks[{number}].bank", f"{attached.bank} is there twice")
        if attached.access not in BANK_ACCESSES:
            raise InvalidRequest(f"banks[{number}].access", "must be read, write or both")
        names.add(attached.bank)
    return tuple(BankAttachment(attached.bank, BANK_ACCESSES[attached.access]) for attached in banks)


def check_page_size(page_size: int) -> int:
    """The page size, or its default for 0."""
    if page_size > MAX_PAGE_SIZE:
        raise InvalidRequest("page_size", f"must be at most {MAX_PAGE_SIZE}, got {page_size}")
    return page_size or DEFAULT_PAGE_SIZE


def _check_chat(chat: pb.ChatInput) -> None:
    if not chat.messages:
        raise InvalidRequest("chat.messages", "must not be empty")
    for number, message in enumerate(chat.messages):
        if not message.role:
            raise InvalidRequest(f"chat.messages[{number}].role", "must not be empty")


def _check_sampling(sampling: pb.Sampling) -> None:
    """Only what bounds the request itself: ranges of floats are the engine's."""
    if sampling.HasField("max_new_tokens") and not 1 <= sampling.max_new_tokens <= _MAX_TOKEN_ID:
        raise InvalidRequest("sampling.max_new_tokens", f"must be from 1 to {_MAX_TOKEN_ID}")
    if sampling.logprobs > _MAX_LOGPROBS:
        raise InvalidRequest("sampling.logprobs", f"must be at most {_MAX_LOGPROBS}, got {sampling.logprobs}")
    if len(sampling.stop) > _MAX_STOPS:
        raise InvalidRequest("sampling.stop", f"at most {_MAX_STOPS} are possible, got {len(sampling.stop)}")
    for number, stop in enumerate(sampling.stop):
        if not 1 <= len(stop) <= _MAX_STOP_CHARACTERS:
            raise InvalidRequest(f"sampling.stop[{number}]", f"must have 1 to {_MAX_STOP_CHARACTERS} characters")
    _check_token_ids("sampling.stop_token_ids", sampling.stop_token_ids)


def _check_token_ids(field: str, token_ids: Sequence[int]) -> None:
    if token_ids and max(token_ids) > _MAX_TOKEN_ID:
        number = next(number for number, token_id in enumerate(token_ids) if token_id > _MAX_TOKEN_ID)
        raise InvalidRequest(f"{field}[{number}]", f"must be below 2^31, got {token_ids[number]}")
