"""Ways to route a trace over simulated workers, and what each one hits, how evenly it loads them, and who waits.

A worker takes turns one after the other, keeps what it reads in two LRUs (device, and a larger host tier that holds the
device's blocks too), evicting ends of conversations first, and needs time for blocks that it computes or restores. A
session's next turn comes when its last one is answered, or later. Decoding is left out: it costs the same wherever a
turn goes. Every way sees the true queues; what the index knows of blocks comes from events, each after the turn that
caused it and a delay.
"""

import hashlib
import heapq
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

import numpy as np

from benchmarks.ladder_trace import Read
from server.block_holders import Tier
from server.router import Candidate, choose
from server.routing_index import BlocksChanged, RoutingIndex, Snapshot, WorkerCosts

INDEX = "index"
POOLED = "all room in one"
WAYS = (INDEX, "random", "round-robin", "session-sticky", "sticky by load")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """What the simulated workers are; an 8B model's KV and a modest accelerator unless told."""

    num_workers: int
    device_blocks: int
    """A worker's."""
    host_blocks: int
    token_s: float = 1 / 5000
    host_byte_s: float = 1 / 20e9
    block_tokens: int = 512
    token_bytes: int = 128 << 10
    event_delay_s: float = 0.1

    @property
    def block_bytes(self) -> int:
        return self.block_tokens * self.token_bytes


class Served(NamedTuple):
    """One turn, by its blocks."""

    device: int
    host: int
    computed: int
    done_s: float
    changes: Sequence[BlocksChanged]


class Worker:
    """One worker: when it is free, and what it has."""

    def __init__(self, worker_id: str, machines: Machines) -> None:
        self.worker_id = worker_id
        self.busy_s = 0.0
        self._free_s = 0.0
        self._machines = machines
        self._done_s: list[float] = []
        self._device, self._host = _LRU(machines.device_blocks), _LRU(machines.host_blocks)
        self._events = 0

    def queue_s(self, now_s: float) -> float:
        return max(0.0, self._free_s - now_s)

    def in_flight(self, now_s: float) -> int:
        while self._done_s and self._done_s[0] <= now_s:
            heapq.heappop(self._done_s)
        return len(self._done_s)

    def serve(self, now_s: float, chain: Sequence[bytes]) -> Served:
        device = sum(block in self._device for block in chain)
        host = sum(block in self._host and block not in self._device for block in chain)
        computed = len(chain) - device - host
        costs = self._machines
        work_s = computed * costs.block_tokens * costs.token_s + host * costs.block_bytes * costs.host_byte_s
        self._free_s = max(now_s, self._free_s) + work_s
        self.busy_s += work_s
        heapq.heappush(self._done_s, self._free_s)
        changes = [self._read(tier, lru, chain) for tier, lru in ((Tier.DEVICE, self._device), (Tier.HOST, self._host))]
        return Served(device, host, computed, self._free_s, changes)

    def _read(self, tier: Tier, lru: "_LRU", chain: Sequence[bytes]) -> BlocksChanged:
        stored, removed = lru.read(chain)
        self._events += 1
        return BlocksChanged(self.worker_id, self._events, tier, stored, removed)


class _LRU:
    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def __contains__(self, block: bytes) -> bool:
        return block in self._blocks

    def read(self, chain: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
        """Blocks that came, and blocks that went for them: a conversation's last ones first."""
        new = {block for block in chain if block not in self._blocks}
        for block in reversed(chain):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        gone = {self._blocks.popitem(last=False)[0] for _ in range(len(self._blocks) - self._capacity)}
        return list(new - gone), list(gone - new)


class Turn(NamedTuple):
    at_s: float
    session: str
    chain: Sequence[bytes]
    """Names of its blocks."""


Route = Callable[[Turn], Worker]


class RoutedByIndex:
    """By what each worker has, as its events tell."""

    def __init__(self, workers: Sequence[Worker], machines: Machines) -> None:
        self._workers = {worker.worker_id: worker for worker in workers}
        self._costs = WorkerCosts(queue_s=0.0, token_s=machines.token_s, host_byte_s=machines.host_byte_s)
        self._index = RoutingIndex(block_tokens=machines.block_tokens, block_bytes=machines.block_bytes)
        for worker in workers:
            self._index.resync(Snapshot(worker.worker_id, 0))
        self._last: dict[str, str] = {}

    def route(self, turn: Turn) -> Worker:
        for worker in self._workers.values():
            self._index.report(worker.worker_id, replace(self._costs, queue_s=worker.queue_s(turn.at_s)))
        choice = self._index.choose(turn.chain, key=turn.session, last_worker_id=self._last.get(turn.session, ""))
        assert choice is not None
        self._last[turn.session] = choice.worker_id
        return self._workers[choice.worker_id]

    def hear(self, event: BlocksChanged) -> None:
        known = self._index.changed(event)
        assert known, "an event was lost"


def by_chance(workers: Sequence[Worker], seed: int) -> Route:
    draw = random.Random(seed)
    return lambda turn: draw.choice(workers)


def in_turn(workers: Sequence[Worker]) -> Route:
    numbers = count()
    return lambda turn: workers[next(numbers) % len(workers)]


def sticky(workers: Sequence[Worker]) -> Route:
    """A session's first turn goes to the shortest queue, all others follow it."""
    homes: dict[str, Worker] = {}

    def route(turn: Turn) -> Worker:
        if turn.session not in homes:
            homes[turn.session] = min(workers, key=lambda worker: worker.queue_s(turn.at_s))
        return homes[turn.session]

    return route


def sticky_by_load(workers: Sequence[Worker]) -> Route:
    """As `server.router` does without an index: sticky unless others have much fewer turns."""
    by_id = {worker.worker_id: worker for worker in workers}
    last: dict[str, str] = {}

    def route(turn: Turn) -> Worker:
        candidates = [Candidate(worker.worker_id, worker.in_flight(turn.at_s), "") for worker in workers]
        chosen = choose(candidates, key=turn.session, last_worker_id=last.get(turn.session, ""))
        assert chosen is not None
        last[turn.session] = chosen
        return by_id[chosen]

    return route


def measure_routing(turns: Sequence[Turn], machines: Machines, *, seed: int) -> dict[str, dict[str, float]]:
    """Each way's figures on the same turns, and what one worker hits that is as large and fast as all."""
    figures = {}
    for way in WAYS:
        workers = [Worker(f"worker-{number}", machines) for number in range(machines.num_workers)]
        index = RoutedByIndex(workers, machines)
        routes: dict[str, Route] = {
            INDEX: index.route,
            "random": by_chance(workers, seed),
            "round-robin": in_turn(workers),
            "session-sticky": sticky(workers),
            "sticky by load": sticky_by_load(workers),
        }
        figures[way] = simulate(turns, workers, routes[way], machines, index.hear)
    pooled = replace(
        machines,
        device_blocks=machines.device_blocks * machines.num_workers,
        host_blocks=machines.host_blocks * machines.num_workers,
        token_s=machines.token_s / machines.num_workers,
        host_byte_s=machines.host_byte_s / machines.num_workers,
    )
    one = [Worker("all", pooled)]
    hit_rate = simulate(turns, one, in_turn(one), pooled, lambda event: None)["hit rate"]
    return figures | {POOLED: {"hit rate": hit_rate}}


def simulate(
    turns: Sequence[Turn],
    workers: Sequence[Worker],
    route: Route,
    machines: Machines,
    hear: Callable[[BlocksChanged], None],
) -> dict[str, float]:
    """`hear` is told each event when it arrives."""
    late: list[tuple[float, int, BlocksChanged]] = []
    numbers = count()
    found: Counter[str] = Counter()
    waits_s, firsts_s = [], []
    answered_s: dict[str, float] = {}
    for turn in _one_at_a_time(turns, answered_s):
        while late and late[0][0] <= turn.at_s:
            hear(heapq.heappop(late)[2])
        worker = route(turn)
        waits_s.append(worker.queue_s(turn.at_s))
        served = worker.serve(turn.at_s, turn.chain)
        firsts_s.append(served.done_s - turn.at_s)
        answered_s[turn.session] = served.done_s
        found.update(device=served.device, host=served.host, computed=served.computed)
        for change in served.changes:
            heapq.heappush(late, (served.done_s + machines.event_delay_s, next(numbers), change))
    busy_s = [worker.busy_s for worker in workers]
    return {
        "hit rate": (found["device"] + found["host"]) / found.total(),
        "on the device": found["device"] / found.total(),
        "max/mean load": max(busy_s) / (sum(busy_s) / len(busy_s)),
        "wait p99, s": float(np.percentile(waits_s, 99)),
        "wait mean, s": float(np.mean(waits_s)),
        "first token mean, s": float(np.mean(firsts_s)),
    }


def _one_at_a_time(turns: Sequence[Turn], answered_s: Mapping[str, float]) -> Iterator[Turn]:
    """Turns by time, each put off until its session's last one is answered."""
    waiting = [(turn.at_s, number, turn) for number, turn in enumerate(turns)]
    heapq.heapify(waiting)
    while waiting:
        at_s, number, turn = heapq.heappop(waiting)
        free_s = answered_s.get(turn.session, 0.0)
        if at_s < free_s:
            heapq.heappush(waiting, (free_s, number, turn))
        else:
            yield turn._replace(at_s=at_s)


def turns_of(trace: Sequence[Read], *, shared_blocks: int = 0) -> list[Turn]:
    """A trace's requests, a session being those with equal first blocks (in this trace nothing else is shared), all
    behind the same `shared_blocks` blocks, as of one system prompt."""
    names = {block: _name(block) for block in {block for read in trace for block in read.blocks}}
    shared = [_name(-1 - number) for number in range(shared_blocks)]
    return [Turn(read.at_s, str(read.blocks[0]), [*shared, *(names[block] for block in read.blocks)]) for read in trace]


def _name(block: int) -> bytes:
    return hashlib.blake2b(block.to_bytes(8, signed=True), digest_size=16).digest()
