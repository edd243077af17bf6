"""What a worker tells of itself: levels, counters, what it holds and what moved. Plain values."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TierUse:
    blocks: int
    capacity_blocks: int
    bytes: int
    capacity_bytes: int


@dataclass(frozen=True, slots=True)
class BlocksHeld:
    """Names of blocks: all that a worker has, or what came to its tiers."""

    device: Sequence[bytes] = ()
    host: Sequence[bytes] = ()

    @property
    def is_empty(self) -> bool:
        return not self.device and not self.host


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """What a worker has measured of itself, in seconds."""

    queue_s: float
    """Work in front of a new turn."""
    token_s: float
    """To compute a token of a prompt."""
    host_byte_s: float
    """To restore a byte from host memory."""
    redis_byte_s: float
    """To restore one from Redis. Infinite where there is none."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What went from one tier to another in one codec since the start, and the seconds that took, coding included (of
    all threads together)."""

    source: str
    target: str
    codec: str
    blocks: int = 0
    bytes: int = 0
    """As they were moved: of payloads."""
    raw_bytes: int = 0
    """As they are on the device."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Aged:
    """Blocks that went from one codec to a smaller one where they lay, in Redis, since the start."""

    source: str
    target: str
    blocks: int
    saved_bytes: int


@dataclass(frozen=True, slots=True)
class AgeingStats:
    aged: tuple[Aged, ...] = ()
    held_back: str = ""
    """Why blocks don't age now, in the store's words; empty where they do."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start, and levels now."""

    device_tokens: int
    host_tokens: int
    redis_tokens: int
    computed_tokens: int
    device: TierUse
    host: TierUse
    stores_dropped: int
    evicted_then_needed: int
    running: int
    waiting: int
    device_blocks: dict[str, int] = field(default_factory=dict)
    """By state: free, used, cached."""
    moved: tuple[Moved, ...] = ()
    audits: dict[str, int] = field(default_factory=dict)
    """Of turns on restored KV, by result: passed, mismatched, skipped (no room, or given up)."""
    ageing: AgeingStats = AgeingStats()
    disk_tokens: int = 0
    disk: TierUse = TierUse(0, 0, 0, 0)
    local_faults: dict[str, int] = field(default_factory=dict)
    """By kind: host_corrupt, disk_corrupt (payloads that were wrong), disk_failed (refused reads and writes), and
    disk_dropped (blocks not written for want of time or room)."""
    waiting_tokens: int = 0
    """Of the prompts of those that wait."""
    turned_away: dict[str, int] = field(default_factory=dict)
    """Requests by reason: overload_requests and overload_tokens (refused: the queue's bounds), deadline_unmeetable
    (dropped while they waited), deadline_passed."""
    prefill_s_saved: float = 0.0
    """What computing the tokens that came from a tier would have taken, by what prefill costs here."""
    store_available: bool | None = None
    """Whether the shared tier is being asked: its breaker is closed. None without one."""
