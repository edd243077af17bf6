"""A public trace of requests by the blocks that they read, and what an LRU cache of bytes would hit of it.

Knows neither Redis nor codecs: sizes and seconds.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.trace import read_trace as read_requests


class Read(NamedTuple):
    """One request's blocks, in order."""

    at_s: float
    blocks: Sequence[int]


class Size(NamedTuple):
    """How large a block is that nobody has read for so long."""

    after_s: float
    num_bytes: float


class _Kept(NamedTuple):
    rung: int
    used_at_s: float


def read_trace(*, one_in: int = 1) -> list[Read]:
    """The trace with every `one_in`-th block alone: as large a share of it hits a cache that is so much smaller."""
    return [
        Read(request.at_s, [piece.id for piece in request.pieces if piece.id % one_in == 0])
        for request in read_requests()
    ]


def num_distinct(trace: Sequence[Read]) -> int:
    return len({block for read in trace for block in read.blocks})


def num_read(trace: Sequence[Read]) -> int:
    return sum(len(read.blocks) for read in trace)


def lru_hits(trace: Sequence[Read], rungs: Sequence[Size], capacity_bytes: float) -> Counter[int]:
    """Hits by the rung that the block had come to. A block that is read keeps its size; one that is missed is born in
    the first rung, and makes the least recently read ones go until all fit.
    """
    kept: OrderedDict[int, _Kept] = OrderedDict()
    due: list[deque[tuple[float, int]]] = [deque() for _ in rungs]
    used_bytes = 0.0
    hits: Counter[int] = Counter()
    for at_s, blocks in trace:
        for number, (after_s, num_bytes) in enumerate(rungs[1:], 1):
            while due[number] and due[number][0][0] + after_s <= at_s:
                used_at_s, block = due[number].popleft()
                was = kept.get(block)
                if was is not None and was.used_at_s == used_at_s and was.rung < number:
                    kept[block] = _Kept(number, used_at_s)
                    used_bytes += num_bytes - rungs[was.rung].num_bytes
        for block in blocks:
            was = kept.get(block)
            if was is None:
                used_bytes += rungs[0].num_bytes
            else:
                hits[was.rung] += 1
            kept[block] = _Kept(was.rung if was else 0, at_s)
            kept.move_to_end(block)
            for waiting in due[1:]:
                waiting.append((at_s, block))
        while used_bytes > capacity_bytes:
            _, gone = kept.popitem(last=False)
            used_bytes -= rungs[gone.rung].num_bytes
    return hits
