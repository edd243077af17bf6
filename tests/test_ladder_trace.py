"""The trace of the ladder's benchmark, the cache that is simulated on it, and the replay against a real one."""

import time
from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest
import torch

from benchmarks.ladder import bars_of, shares_of
from benchmarks.ladder_kv import EncodedKV
from benchmarks.ladder_replay import Replay
from benchmarks.ladder_trace import Read, Size, lru_hits, num_distinct, num_read, read_trace
from cache_store.codecs import LADDER, LOSSLESS, RAW
from cache_store.ladder import parse_ladder
from cache_store.layout import KVLayout
from worker.tiers.codecs import open_codecs
from worker.tiers.shrink import Shrinker


def plainly(trace: Sequence[Read], rungs: Sequence[Size], capacity_bytes: float) -> Counter[int]:
    """The same, by looking at every block each time."""
    kept: list[tuple[int, int, float]] = []  # block, rung, last read; least recently read first
    hits: Counter[int] = Counter()
    for at_s, blocks in trace:
        kept = [
            (block, max(rung, max(n for n, each in enumerate(rungs) if each.after_s <= at_s - used_s)), used_s)
            for block, rung, used_s in kept
        ]
        for block in blocks:
            found = next((each for each in kept if each[0] == block), None)
            if found is not None:
                kept.remove(found)
                hits[found[1]] += 1
            kept.append((block, found[1] if found else 0, at_s))
        while sum(rungs[rung].num_bytes for _, rung, _ in kept) > capacity_bytes:
            kept.pop(0)
    return hits


@pytest.mark.parametrize("seed", range(20))
def test_hits_are_those_of_a_cache_that_looks_at_every_block(seed: int) -> None:
    random = Random(seed)
    trace, at_s = [], 0.0
    for _ in range(300):
        at_s += random.choice([0, 1, 2, 7])
        first = int(random.expovariate(0.05))
        trace.append(Read(at_s, range(first, first + random.randint(1, 6))))
    for rungs in ([Size(0, 10)], [Size(0, 10), Size(9, 6), Size(30, 3)]):
        for capacity_bytes in (25, 120, 400):
            hits = lru_hits(trace, rungs, capacity_bytes)
            assert hits == plainly(trace, rungs, capacity_bytes)
            assert hits.total() > 0


def test_the_trace_is_all_there() -> None:
    trace = read_trace()
    assert (len(trace), num_read(trace), num_distinct(trace)) == (3993, 121_877, 43_924)
    assert trace[1].blocks[:3] == [79, 80, 81]
    assert trace[-1].at_s == 1022.025


def test_a_sample_of_the_blocks_hits_as_often_as_all_of_them() -> None:
    rates = []
    for one_in in (1, 16):
        trace = read_trace(one_in=one_in)
        hits = lru_hits(trace, [Size(0, 10), Size(10, 5)], 0.1 * 10 * num_distinct(trace))
        rates.append(hits.total() / num_read(trace))
    assert rates[1] == pytest.approx(rates[0], abs=0.01)


def test_a_replay_finds_blocks_as_their_originals_would_be_on_every_rung() -> None:
    layout = KVLayout(num_layers=1, num_kv_heads=2, head_dim=64, block_tokens=64, dtype="bfloat16")
    codecs = open_codecs(layout, None, torch.device("cpu"))
    original = torch.randn(layout.block_shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    payloads = {}
    for codec in codecs.values():
        into = memoryview(bytearray(layout.block_bytes))
        payloads[codec.info] = [into[: codec.encode(original, into, num_tokens=64, first_position=0)]]
    kv = EncodedKV(layout, payloads, Shrinker(layout, codecs))
    hot, cold = range(4), range(4, 10)
    trace = [Read(0, [*hot, *cold]), *(Read(at / 2, hot) for at in range(1, 10)), Read(5, [*hot, *cold])]
    replay = Replay(LADDER, 1 << 20, kv=kv, ladder=parse_ladder("lossless,int8@3"))
    replay.run(trace, start_s=time.monotonic() + 0.5, speed=1.0)
    assert replay.hits == {"lossless": 10 * len(hot), "int8": len(cold)}


def test_arms_without_a_hit_are_reported_like_others() -> None:
    never = {RAW.name: 0.0, LOSSLESS.name: 0.0, LADDER: 0.0}
    some = {RAW.name: 0.0, LOSSLESS.name: 0.2, LADDER: 0.1}
    assert [bar.holds for bar in bars_of({0.1: never}, some, 0.1)] == [True, True, True, False]
    assert shares_of(Counter()) == shares_of(Counter({"int8": 0})) == {}
    assert shares_of(Counter({"int8": 3, "int4": 1, "lossless": 0})) == {"int8": 0.75, "int4": 0.25}
