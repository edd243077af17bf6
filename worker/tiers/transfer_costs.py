"""What bringing a block to the device costs, learned from what landed: by tier its latency and rate, by codec decoding.

Any thread may call.
"""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from worker.tiers.moves import Tier

_NEWEST = 0.15
_START_LATENCY_S, _START_BYTE_S = 1e-3, 1 / 1e9
"""Only until something landed."""
_FORGET = 0.95
_FORGET_IN_S = 0.5
"""What landed counts less with every later landing, and with the time that it took: blocks that arrive in bursts, as a
socket's buffer hands them over, don't outweigh the wait before them."""
_STALL_S, _MOST = 0.1, 8.0
"""A landing counts as this long at the most, or as so many times what was expected: one stall is only one."""
_START_COPY_BYTE_S = 1 / 4e9
_DOUBTED_IN_S = 30.0
"""What decoding takes is believed less and less while nothing is decoded: an estimate that has everything computed
would never meet another block that corrects it."""
_PROBE_AFTER_S = 10.0
"""A tier that nothing came from for so long is asked for a block that nobody waits for, to see how it does now."""


@dataclass(slots=True)
class _Line:
    """One tier's way to host memory."""

    heard_s: float
    """When an answer came last."""
    latency_s: float = _START_LATENCY_S
    seconds: float = _START_BYTE_S
    num_bytes: float = 1.0
    """Their quotient is the time of a byte."""
    in_flight: int = 0
    is_first: bool = True
    """Nothing came since the line was idle."""
    since_s: float = 0.0
    """When the latest answer came, or the line began to be busy."""

    @property
    def byte_s(self) -> float:
        return self.seconds / self.num_bytes

    def landed(self, num_bytes: int, now_s: float) -> None:
        most_s = max(_STALL_S, _MOST * num_bytes * self.byte_s)
        elapsed_s = min(now_s - self.since_s, most_s)
        if self.is_first:
            self.latency_s += 2 * _NEWEST * (max(0.0, elapsed_s - num_bytes * self.byte_s) - self.latency_s)
        elif num_bytes:
            kept = _FORGET * math.exp(-elapsed_s / _FORGET_IN_S)
            self.seconds = kept * self.seconds + elapsed_s
            self.num_bytes = kept * self.num_bytes + num_bytes
        self.is_first, self.since_s = False, now_s


class _Decoding:
    """What one codec's payload takes from host memory to the device."""

    def __init__(self, start_s: float) -> None:
        self._start_s = start_s
        self._seconds: float | None = None
        self._heard_s = 0.0

    def at(self, now_s: float) -> float:
        if self._seconds is None:
            return self._start_s
        kept = math.exp(-max(0.0, now_s - self._heard_s) / _DOUBTED_IN_S)
        return self._start_s + kept * (self._seconds - self._start_s)

    def took(self, seconds: float, now_s: float) -> None:
        if self._seconds is None:
            self._seconds = seconds
        else:
            was = self.at(now_s)
            seconds = min(seconds, _MOST * was)
            self._seconds = was + (_NEWEST if seconds > was else 2 * _NEWEST) * (seconds - was)
        self._heard_s = now_s


class TransferCosts:
    def __init__(self, block_bytes: int, *, now: Callable[[], float] = time.monotonic) -> None:
        self._block_bytes = block_bytes
        self._now = now
        self._lock = threading.Lock()
        self._lines: dict[Tier, _Line] = {}
        self._payload_bytes: dict[str, float] = {}
        self._decoding: dict[str, _Decoding] = {}

    def asked(self, tier: Tier) -> None:
        """A tier below host memory is being asked for a block: `ended` follows."""
        with self._lock:
            line = self._line(tier)
            if not line.in_flight:
                line.is_first, line.since_s = True, self._now()
            line.in_flight += 1

    def ended(self, tier: Tier, num_bytes: int | None) -> None:
        """The answer is here, with so many bytes. None: it did not come, or says nothing of the tier's speed."""
        with self._lock:
            line = self._line(tier)
            assert line.in_flight > 0, f"{tier.name} answered what it was not asked for"
            line.in_flight -= 1
            if num_bytes is None:
                return
            line.heard_s = self._now()
            line.landed(num_bytes, line.heard_s)

    def decoded(self, codec: str, num_bytes: int, seconds: float) -> None:
        """A payload of a session of this codec was written to the device: `seconds` from that to the next one's."""
        with self._lock:
            was = self._payload_bytes.get(codec, float(num_bytes))
            self._payload_bytes[codec] = was + _NEWEST * (num_bytes - was)
            self._decoding_of(codec).took(seconds, self._now())

    def is_due_for_probe(self, tier: Tier) -> bool:
        """Was nothing heard of this tier for long? Says so once for each time that it is."""
        with self._lock:
            line = self._line(tier)
            if line.in_flight or self._now() - line.heard_s < _PROBE_AFTER_S:
                return False
            line.heard_s = self._now()
            return True

    def latency_s(self, tier: Tier) -> float:
        """Until the first block comes, beside what its bytes take."""
        with self._lock:
            return 0.0 if tier is Tier.HOST else self._line(tier).latency_s

    def block_s(self, tier: Tier, codec: str) -> float:
        """Seconds from one block's landing on the device to the next one's. `codec` is the session's."""
        with self._lock:
            num_bytes = self._payload_bytes.get(codec, self._block_bytes)
            decode_s = self._decoding_of(codec).at(self._now())
            if tier is Tier.HOST:
                return decode_s
            return max(decode_s, num_bytes * self._line(tier).byte_s)

    def _line(self, tier: Tier) -> _Line:
        if tier not in self._lines:
            self._lines[tier] = _Line(self._now())
        return self._lines[tier]

    def _decoding_of(self, codec: str) -> _Decoding:
        if codec not in self._decoding:
            self._decoding[codec] = _Decoding(self._block_bytes * _START_COPY_BYTE_S)
        return self._decoding[codec]
