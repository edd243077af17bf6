"""Choose the worker for a turn, from plain numbers. No I/O, no clock, no randomness."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

STICKINESS = 8
"""How many more turns than the least loaded worker the last one may have and still be preferred. Restoring a session
elsewhere costs a turn its restore; waiting behind this many costs about as much."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that accepts work."""

    worker_id: str
    in_flight: int
    model: str
    """Fingerprint."""


def choose(candidates: Sequence[Candidate], *, key: str, last_worker_id: str = "", model: str = "") -> str | None:
    """The id of the worker for a turn, or None where there is no candidate.

    Workers of the session's own model come first (only they can use its KV); then the one that served it last, unless
    it is much busier than another; then the least busy, and among equals always the same one for the same `key`.
    """
    able = [candidate for candidate in candidates if candidate.model == model] or list(candidates)
    if not able:
        return None
    least = min(candidate.in_flight for candidate in able)
    for candidate in able:
        if candidate.worker_id == last_worker_id and candidate.in_flight <= least + STICKINESS:
            return candidate.worker_id
    idle = [candidate.worker_id for candidate in able if candidate.in_flight == least]
    return max(idle, key=lambda worker_id: _weight(key, worker_id))


def _weight(key: str, worker_id: str) -> bytes:
    """Rendezvous hashing: when a worker goes, only its own keys move."""
    return hashlib.blake2b(f"{worker_id}\0{key}".encode(), digest_size=8).digest()
