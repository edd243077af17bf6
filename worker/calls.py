"""What the engine is asked and what it answers. No torch, no protobuf: cheap to import."""

from dataclasses import dataclass, field
from enum import Enum

from cache_store.codecs import RAW
from cache_store.errors import InvalidRequest
from cache_store.inserts import check_inserts

MAX_LOGPROBS = 20


class FinishReason(Enum):
    """Values are protos' FinishReason."""

    EOS = 1
    STOP = 2
    LENGTH = 3


class ContextPolicy(Enum):
    """What becomes of a conversation that outgrows the model's window. Values are protos' ContextPolicy."""

    ERROR = 1
    WINDOW = 2
    RECALL = 3


@dataclass(frozen=True, slots=True)
class Context:
    """A conversation's policy, and where its turns begin."""

    policy: ContextPolicy = ContextPolicy.ERROR
    turn_bounds: tuple[int, ...] = ()
    """Of the committed turns: start, reply_start, start, reply_start, ... Only RECALL needs them."""
    insert_bounds: tuple[int, ...] = ()
    """Of what was inserted (`cache_store/inserts.py`): start, end, start, end, ... Without a policy only."""

    def check(self, num_history: int) -> None:
        """Raises InvalidRequest where the bounds are none of a history of so many tokens."""
        bounds = self.turn_bounds
        check_inserts("history.insert_bounds", self.insert_bounds, 0, num_history)
        if self.insert_bounds and self.policy is not ContextPolicy.ERROR:
            raise InvalidRequest("history.insert_bounds", "nothing is inserted into a session with a context policy")
        if self.policy is not ContextPolicy.RECALL:
            return
        if len(bounds) % 2 or bool(bounds) != bool(num_history):
            raise InvalidRequest("history.turn_bounds", "must be start and reply_start of each turn of the history")
        if list(bounds) != sorted(bounds) or (bounds and (bounds[0] != 0 or bounds[-1] > num_history)):
            raise InvalidRequest("history.turn_bounds", f"must grow from 0 to {num_history} at the most")


PLAIN = Context()


class MissReason(Enum):
    """Why a prompt token was computed. Values are protos' MissReason."""

    NEW = 1
    ABSENT = 2
    CORRUPT = 3
    FOREIGN = 4
    LATE = 5
    UNAVAILABLE = 6
    NO_ROOM = 7
    TAIL = 8
    FASTER = 9


class PlanKind(Enum):
    """How a turn's missing KV was to be had. Values are protos' PlanKind."""

    LOAD = 1
    COMPUTE = 2
    BOTH_ENDS = 3
    """Computed from the front while blocks arrived from the back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Built from a request, complete, checked once."""

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and reply, as transformers' RepetitionPenaltyLogitsProcessor."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """Both over the reply alone, as OpenAI defines them."""
    seed: int = 0
    """The n-th token of a reply is a function of its logits, the seed and n alone."""
    logprobs: int | None = None
    """Report the chosen token's log-probability and those of this many likeliest tokens."""

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("temperature", self.temperature, 0.0, 100.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
            ("logprobs", self.logprobs or 0, 0, MAX_LOGPROBS),
            ("seed", self.seed, 0, 2**64 - 1),
        ):
            if not low <= value <= high:  # NaN fails too
                raise InvalidRequest(f"sampling.{name}", f"must be from {low} to {high}, got {value}")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequest("sampling.top_p", f"must be above 0 and at most 1, got {self.top_p}")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise InvalidRequest("sampling.repetition_penalty", f"must be above 0, got {self.repetition_penalty}")

    @property
    def has_penalties(self) -> bool:
        return bool(self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """One turn, in tokens."""

    request_id: str
    tenant: str
    history: tuple[int, ...]
    """Committed tokens of the session; their KV may be in any tier."""
    input: tuple[int, ...]
    """New tokens of this turn. history + input is the prompt and must not be empty."""
    begun: tuple[int, ...] = ()
    """The reply's first tokens, where another worker has generated them: what comes after them is generated."""
    sampling: Sampling
    max_new_tokens: int | None
    """None: 256, or what is left of the window where that is less."""
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()
    """Empty when the request ignores them."""
    block_ttl_s: int = 86_400
    deadline_s: float | None = None
    """Of `time.monotonic()`."""
    codec: str = RAW.name
    """How the history's KV is kept below the device: one of `cache_store.codecs.SESSION_CODECS`."""
    audit: bool = False
    """Compute all of it again where KV was restored, and tell in the receipt how the two compare."""
    context: Context = PLAIN
    insert_bounds: tuple[int, ...] = ()
    """Parts of the input whose KV is inserted where a tier has it, as in `Context`. The prompt's end is in none."""
    device_only: bool = False
    """Nobody will go on from here: its KV goes to no tier below the device."""

    def check(self) -> None:
        """Raises InvalidRequest where bounds are none of its tokens."""
        num_history = len(self.history)
        self.context.check(num_history)
        check_inserts("insert_bounds", self.insert_bounds, num_history, num_history + len(self.input) - 1)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. The token that ended the reply (eos, stop token) is sent too."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """A turn on restored KV beside the same turn computed, over the positions that chose the reply's tokens."""

    tokens: int
    agreeing_tokens: int
    """Positions at which both find the same token likeliest."""
    mean_kl: float
    """KL(computed || restored) of the next token, in nats."""
    max_kl: float
    nll_drift: float
    """By how much the reply's tokens are less likely on restored KV: mean negative log-likelihood, in nats."""
    passed: bool
    """Within the bound of the session's codec."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePlan:
    """What the worker decided when it admitted a turn that the device lacked blocks for, and what came of it."""

    kind: PlanKind
    predicted_ms: float
    actual_ms: float
    """Both from admission to the first token."""
    computed_instead_tokens: int
    """Computed although a tier was believed to have them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextReceipt:
    """How a conversation longer than the window was attended to."""

    policy: ContextPolicy
    left_tokens: int
    """Of the prompt, what had left the window before this turn: neither found nor computed."""
    choices: int = 0
    """How often it was chosen what to recall."""
    recalled_tokens: int = 0
    """Of what had left, how many tokens any layer attended to at the turn's end."""
    recalled_starts: tuple[int, ...] = ()
    """The first token of each recalled unit, in order."""
    unit_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a prompt cost, in tokens by source. `check` holds for every receipt that leaves the engine."""

    device_tokens: int
    host_tokens: int
    redis_tokens: int
    computed_tokens: int
    disk_tokens: int = 0
    misses: dict[MissReason, int] = field(default_factory=dict)
    restored_bytes: int = 0
    """Of payloads; with RECALL also what came in the course of the turn."""
    queue_ms: float = 0.0
    restore_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    ttft_ms: float = 0.0
    plan: RestorePlan | None = None
    """None where nothing was to be weighed: the device had all, or no tier below may have had the rest."""
    audit: AuditReport | None = None
    """Of a turn that asked for it and restored something, where there was room for it in time."""
    context: ContextReceipt | None = None
    """Of a turn that reached beyond the window."""
    insert_bounds: tuple[int, ...] = ()
    """What is inserted in the conversation now: the rest of what was to be was computed where it stands."""

    def check(self, prompt_tokens: int) -> None:
        sources = self.device_tokens + self.host_tokens + self.disk_tokens + self.redis_tokens + self.computed_tokens
        sources += self.context.left_tokens if self.context is not None else 0
        assert sources == prompt_tokens, f"{sources} tokens accounted for, {prompt_tokens} in the prompt"
        assert sum(self.misses.values()) == self.computed_tokens, f"{self.misses} != {self.computed_tokens} computed"


@dataclass(frozen=True, slots=True)
class Finished:
    reason: FinishReason
    receipt: Receipt
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The request is over and nothing more comes. Its blocks are released already."""

    error: Exception


Event = Token | Finished | Failed
"""What a listener is told: Tokens, then exactly one Finished or Failed (none after a cancel)."""


@dataclass(frozen=True, slots=True)
class ParkReport:
    redis_tokens: int
    device_blocks_dropped: int
    host_blocks_dropped: int
    bytes_stored: int


@dataclass(frozen=True, slots=True)
class WarmReport:
    device_tokens: int
    restored_tokens: int


@dataclass(frozen=True, slots=True)
class Located:
    device_tokens: int
    host_tokens: int
    redis_tokens: int
    disk_tokens: int = 0


@dataclass(frozen=True, slots=True)
class DropReport:
    device_blocks: int
    host_blocks: int
    disk_blocks: int
    redis_blocks: int
