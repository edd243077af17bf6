"""Hits that smaller codecs, and a ladder of them, buy on a public trace with a Redis of fixed size.

Measured: the codecs' sizes, on real KV; and at one size a replay of a sample of the trace's blocks against real Redis
servers (volatile-lru), with real blocks and the worker's own ageing. Simulated: all blocks, several sizes, exact LRU.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.harness import Bar, at_least, finish
from benchmarks.ladder_kv import EncodedKV, encode_kv
from benchmarks.ladder_replay import Replay
from benchmarks.ladder_trace import Read, Size, lru_hits, num_distinct, num_read, read_trace
from cache_store.codecs import INT4, INT8, LADDER, LOSSLESS, RAW, named
from cache_store.ladder import Ladder, Rung, parse_ladder

_ARMS = (RAW.name, LOSSLESS.name, INT8.name, INT4.name, LADDER)
_SHARES = (0.05, 0.1, 0.2, 0.4)
"""Of the bytes that all of the trace's blocks take raw."""
_BLOCK_TOKENS = 64
_BLOCKS = 16
_START_S = 3.0
"""All servers run when the trace begins."""


def run(
    *,
    model: str = "rekindle-recall",
    ladder: str = "lossless,int8@600,int4@3600",
    stretch: float = 60.0,
    speed: float = 10.0,
    share: float = 0.1,
    one_in: int = 32,
    as_json: bool = False,
) -> int:
    """Count hits of raw, lossless, int8, int4 and the ladder on Mooncake's synthetic trace.

    The trace lasts 17 minutes, in which nothing gets cold: so each of its seconds stands for `stretch` seconds of the
    ladder's. The real replay takes 1022 / `speed` seconds.

    Args:
        model: Whose KV to encode: rekindle-recall (the project's own), a directory, or preset:NAME.
        ladder: As --codec-ladder.
        stretch: Seconds of the ladder's that one second of the trace stands for.
        speed: Seconds of the trace that the real replay lets pass in one. Redis tells idle times in whole seconds: the
            ladder's first must be one at least, divided by stretch and speed.
        share: Size of the replay's Redis, of the bytes that all of the trace's blocks take raw.
        one_in: The replay reads every so many-th block only, from a Redis that is so much smaller.
        as_json: Print one JSON object.
    """
    stated = parse_ladder(ladder)
    of_trace, of_replay = stated.sped_up(stretch), stated.sped_up(stretch * speed)
    if any(rung.after_s < 1.0 for rung in of_replay.rungs[1:]):
        raise SystemExit(f"rekindle: redis can't tell idle times below a second: {ladder} is too fast for the replay")
    kv = encode_kv(model, block_tokens=_BLOCK_TOKENS, blocks=_BLOCKS)
    full, sample = read_trace(), read_trace(one_in=one_in)
    simulated = {size: _rates(_simulated(full, kv, of_trace, size), full) for size in _SHARES}
    expected = _simulated(sample, kv, of_trace, share)
    replays = _replayed(sample, kv, of_replay, share, speed)
    real = {arm: replay.hits for arm, replay in replays.items()}
    figures: dict[str, Any] = {
        "model": Path(model).name,
        "ladder": ladder,
        "raw block bytes": kv.layout.block_bytes,
        "times smaller": {name: round(kv.mean_bytes(RAW) / kv.mean_bytes(named(name)), 3) for name in _ARMS[:-1]},
        "trace": {"requests": len(full), "distinct blocks": num_distinct(full), "blocks read": num_read(full)},
        **{f"hit rate at {size:.0%}, simulated": row for size, row in simulated.items()},
        f"hit rate at {share:.0%}, simulated, 1 block in {one_in}": _rates(expected, sample),
        f"hit rate at {share:.0%}, real redis, 1 block in {one_in}": _rates(real, sample),
        "ladder's hits by codec, simulated": shares_of(expected[LADDER]),
        "ladder's hits by codec, real redis": shares_of(real[LADDER]),
        "real replay behind by at most, s": max(replay.late_s for replay in replays.values()),
    }
    return finish("ladder", figures, bars_of(simulated, _rates(real, sample), share), as_json=as_json)


def _simulated(trace: Sequence[Read], kv: EncodedKV, ladder: Ladder, share: float) -> dict[str, Counter[str]]:
    """Hits of each arm by codec; the ladder's seconds are the trace's."""
    capacity_bytes = share * num_distinct(trace) * kv.layout.block_bytes
    ladders = {arm: Ladder((Rung(named(arm), 0.0),)) for arm in _ARMS[:-1]} | {LADDER: ladder}
    hits: dict[str, Counter[str]] = {}
    for arm, of_arm in ladders.items():
        rungs = of_arm.rungs
        by_rung = lru_hits(trace, [Size(rung.after_s, kv.mean_bytes(rung.codec)) for rung in rungs], capacity_bytes)
        hits[arm] = Counter({rungs[number].codec.name: count for number, count in by_rung.items()})
    return hits


def _replayed(trace: Sequence[Read], kv: EncodedKV, ladder: Ladder, share: float, speed: float) -> Mapping[str, Replay]:
    """All arms side by side, each with a Redis of its own; the ladder's seconds are real ones."""
    capacity_bytes = int(share * num_distinct(trace) * kv.layout.block_bytes)
    replays = {arm: Replay(arm, capacity_bytes, kv=kv, ladder=ladder) for arm in _ARMS}
    start_s = time.monotonic() + _START_S
    with ThreadPoolExecutor(len(replays)) as threads:
        running = [threads.submit(replay.run, trace, start_s=start_s, speed=speed) for replay in replays.values()]
        for replay in running:
            replay.result()
    return replays


def bars_of(simulated: Mapping[float, Mapping[str, float]], real: Mapping[str, float], share: float) -> list[Bar]:
    """The ladder hits at least as often as raw and lossless do, be that never: `simulated` and `real` are rates."""
    return [
        at_least(f"{what}: ladder's hit rate against {other}'s", row[LADDER], row[other])
        for what, row in [
            *((f"{size:.0%}, simulated", row) for size, row in simulated.items()),
            (f"{share:.0%}, real redis", real),
        ]
        for other in (RAW.name, LOSSLESS.name)
    ]


def _rates(hits: Mapping[str, Counter[str]], trace: Sequence[Read]) -> dict[str, float]:
    return {arm: round(of_arm.total() / num_read(trace), 4) for arm, of_arm in hits.items()}


def shares_of(hits: Counter[str]) -> dict[str, float]:
    """Each codec's share of the hits; nothing of a codec, or of an arm, without any."""
    return {codec: round(count / hits.total(), 4) for codec, count in hits.most_common() if count}
