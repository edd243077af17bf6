"""The routing index at full size: its memory, and how long decisions, updates, a resync and tidying up take."""

import gc
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from server.block_holders import Tier
from server.routing_index import BlocksChanged, RoutingIndex, Snapshot, WorkerCosts

_NAME_BYTES = 16
_TENANTS = 20
_SYSTEM_BLOCKS = 64
_MEDIAN_BLOCKS, _SIGMA = 60, 1.0
"""Of a session, without its tenant's system prompt: lognormal."""
_MOVED = 0.1
"""Share of the sessions whose first half is on a second worker too."""
_ON_DEVICE = 0.2
"""Share of the sessions that are on the device; all are on their worker's host tier."""
_EVENT_BLOCKS = 32
_ROUNDS = 3


class _Session(NamedTuple):
    number: int
    worker: int
    moved_to: int | None
    num_blocks: int
    on_device: bool

    @property
    def tenant(self) -> int:
        return self.number % _TENANTS


class Fleet:
    """Sessions of many workers, and the index that knows them all. Deterministic by its seed."""

    def __init__(self, *, num_workers: int, num_blocks: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._seed = seed
        self._numbers = [0] * num_workers
        self.index = RoutingIndex(block_tokens=16, block_bytes=1 << 21)
        self.sessions = list(self._draw(num_workers, num_blocks))
        self._system = [self._names(tenant, _SYSTEM_BLOCKS) for tenant in range(_TENANTS)]

    def _draw(self, num_workers: int, num_blocks: int) -> Iterator[_Session]:
        left, number = num_blocks, _TENANTS  # lower numbers name system prompts
        while left > 0:
            length = min(left, 1 + int(self._rng.lognormal(np.log(_MEDIAN_BLOCKS), _SIGMA)))
            worker, other = (int(each) for each in self._rng.integers(num_workers, size=2))
            moved, on_device = self._rng.random(2)
            yield _Session(number, worker, other if moved < _MOVED else None, length, bool(on_device < _ON_DEVICE))
            left, number = left - length, number + 1

    def fill(self) -> int:
        """Let every worker say what it has. Returns how many blocks were told, one on two tiers twice."""
        told = 0
        for worker in range(len(self._numbers)):
            self.report(worker)
            self.index.resync(Snapshot(worker_id(worker), 0))
        for session in self.sessions:
            names = self._names(session.number, session.num_blocks)
            told += self.tell(session.worker, Tier.HOST, self._system[session.tenant])
            told += self.tell(session.worker, Tier.HOST, names)
            if session.on_device:
                told += self.tell(session.worker, Tier.DEVICE, self._system[session.tenant])
                told += self.tell(session.worker, Tier.DEVICE, names)
            if session.moved_to is not None:
                told += self.tell(session.moved_to, Tier.HOST, self._system[session.tenant])
                told += self.tell(session.moved_to, Tier.HOST, names[: len(names) // 2])
        return told

    def report(self, number: int) -> None:
        """One worker's queue and speeds, measured anew."""
        queue, compute, host = self._rng.random(3)
        costs = WorkerCosts(
            queue_s=float(0.2 * queue), token_s=1e-4 * (1 + 0.02 * compute), host_byte_s=1e-10 * (1 + 0.1 * host)
        )
        self.index.report(worker_id(number % len(self._numbers)), costs)

    def tell(self, worker: int, tier: Tier, stored: Sequence[bytes], removed: Sequence[bytes] = ()) -> int:
        self._numbers[worker] += 1
        known = self.index.changed(BlocksChanged(worker_id(worker), self._numbers[worker], tier, stored, removed))
        assert known, "an event without a gap was taken for one with a gap"
        return len(stored) + len(removed)

    def chain(self, session: _Session) -> list[bytes]:
        """What the session's next turn reads: its tenant's system prompt, its history, and up to four new blocks."""
        new = self._names(len(self.sessions) + session.number, 1 + session.number % 4)
        return [*self._system[session.tenant], *self._names(session.number, session.num_blocks), *new]

    def _names(self, number: int, num_blocks: int) -> list[bytes]:
        names = np.random.default_rng([self._seed, number]).bytes(num_blocks * _NAME_BYTES)
        return [names[at : at + _NAME_BYTES] for at in range(0, len(names), _NAME_BYTES)]


def worker_id(worker: int) -> str:
    return f"worker-{worker}"


def measure_index(*, num_workers: int, num_blocks: int, decisions: int, seed: int) -> dict[str, Any]:
    """Fill an index and measure it, wholly on this thread."""
    fleet = Fleet(num_workers=num_workers, num_blocks=num_blocks, seed=seed)
    gc.collect()
    gc.freeze()  # this benchmark's own sessions: what the index brings with it stays the collector's to look at
    before = _resident_bytes()
    began = time.perf_counter()
    told = fleet.fill()
    filled_s = time.perf_counter() - began
    gc.collect()
    memory = _resident_bytes() - before
    rng = np.random.default_rng(seed + 1)
    turns = [fleet.sessions[number] for number in rng.integers(len(fleet.sessions), size=decisions)]
    figures = {
        "workers": num_workers,
        "distinct blocks": fleet.index.num_blocks,
        "blocks told": told,
        "index MiB": memory / 2**20,
        "bytes a block": memory / fleet.index.num_blocks,
        "filled, blocks/s": told / filled_s,
        **_decisions(fleet, turns),
        "updates/s": _updates(fleet, turns),
        **_resync(fleet),
        "peak MiB of the process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }
    gc.unfreeze()
    return figures


def _decisions(fleet: Fleet, turns: Sequence[_Session]) -> dict[str, Any]:
    """Microseconds, one decision at a time, each for another session; half of them know the last worker. A worker
    reports between two of them. Of the clock and of the processor, all that was seen."""
    cpu_us, wall_us = np.empty((_ROUNDS, len(turns))), np.empty((_ROUNDS, len(turns)))
    right = 0
    for number in range(_ROUNDS):
        for turn, session in enumerate(turns):
            fleet.report(turn)
            chain = fleet.chain(session)
            last = worker_id(session.worker) if turn % 2 else ""
            key = f"session-{session.number}"
            cpu_began, began = time.thread_time_ns(), time.perf_counter_ns()
            choice = fleet.index.choose(chain, key=key, last_worker_id=last)
            ended, cpu_ended = time.perf_counter_ns(), time.thread_time_ns()
            wall_us[number, turn], cpu_us[number, turn] = (ended - began) / 1000, (cpu_ended - cpu_began) / 1000
            assert choice is not None
            right += choice.device_blocks + choice.host_blocks >= _SYSTEM_BLOCKS + session.num_blocks
    return {
        "decision p50, us": float(np.percentile(wall_us, 50)),
        "decision p99, us": float(np.percentile(wall_us, 99)),
        "decision p50, us of the processor": float(np.percentile(cpu_us, 50)),
        "decision p99, us of the processor": float(np.percentile(cpu_us, 99)),
        "decision p99, us, median of rounds": float(np.percentile(np.median(wall_us, axis=0), 99)),
        "went where the history is": right / wall_us.size,
        "blocks of a prompt, mean": float(np.mean([_SYSTEM_BLOCKS + session.num_blocks for session in turns])),
    }


def _updates(fleet: Fleet, turns: Sequence[_Session]) -> float:
    """Blocks a second: sessions leave their host tier and come back, in events of 32 blocks."""
    seconds, blocks = 0.0, 0
    for session in turns[: max(1, len(turns) // 10)]:
        names = fleet.chain(session)[_SYSTEM_BLOCKS : _SYSTEM_BLOCKS + session.num_blocks]
        parts = [names[at : at + _EVENT_BLOCKS] for at in range(0, len(names), _EVENT_BLOCKS)]
        began = time.perf_counter()
        for part in reversed(parts):
            blocks += fleet.tell(session.worker, Tier.HOST, (), part)
        for part in parts:
            blocks += fleet.tell(session.worker, Tier.HOST, part)
        seconds += time.perf_counter() - began
    return blocks / seconds


def _resync(fleet: Fleet) -> dict[str, float]:
    """A worker that is begun anew with nothing, and the sweep behind it."""
    began = time.perf_counter()
    fleet.index.resync(Snapshot(worker_id(0), 0))
    resync_s = time.perf_counter() - began
    pauses = [0.0]
    more = True
    while more:
        began = time.perf_counter()
        more = fleet.index.sweep()
        pauses.append(time.perf_counter() - began)
    return {"resync, us": resync_s * 1e6, "sweep, s in all": sum(pauses), "sweep, longest pause, ms": max(pauses) * 1e3}


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
