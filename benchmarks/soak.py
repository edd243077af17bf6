"""A constant load of conversations, without a fault: the memory of every process stays where it is, or a bar fails.

The storm's deployment and its users (`rekindle bench chaos`), with caches so small that they are full before it counts.
"""

import asyncio
import itertools
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.chaos import SPARE_DESCRIPTORS, Aftermath, settled
from benchmarks.chaos_load import Clients, Script, Tally, keep_talking, scripts, undisturbed
from benchmarks.chaos_part import Use, use_of
from benchmarks.chaos_parts import WORKER, Deployment, deployment
from benchmarks.harness import Bar, at_least, at_most, finish

_SETTINGS = WORKER | {"device_cache_bytes": 8 << 20, "host_cache_bytes": 8 << 20}
"""The conversations that are on need more: blocks are evicted from both all the time."""
_WARM_UP = 0.5
"""The share of the time that does not count: caches fill, allocators get what they will keep."""
_NUM_SAMPLES = 200
_FLAT_MIB = 2.0
"""By so much the line fitted through a process's memory may rise over what counts, however long that is."""
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Sample:
    """What every process holds at one moment, by its name."""

    at_s: float
    turns: int
    uses: Mapping[str, Use]


@dataclass(frozen=True, slots=True)
class Growth:
    """One process's memory over the time that counts."""

    course_mib: list[float]
    """At eleven moments, from the first to the last."""
    rise_mib: float
    """Of the fitted line, from the first sample to the last."""
    mib_per_hour: float
    mib_per_thousand_turns: float
    descriptors: int
    """The most."""


def run(*, minutes: float = 8.0, seed: int = 1, conversations: int = 24, users: int = 6, as_json: bool = False) -> int:
    """Hold conversations with two workers, two front ends and a Redis, and watch memory and descriptors of each.

    Args:
        minutes: How long; the first half is for warming up.
        seed: Of dialogues and users.
        conversations: Different dialogues; users take them in turn.
        users: Conversations at once.
        as_json: Print one JSON object.
    """
    wanted = scripts(conversations, seed=seed)
    with deployment(seed=seed, worker_settings=_SETTINGS) as system:
        tally, samples, after = asyncio.run(_soak(system, wanted, minutes * 60, users, seed))
    growths = grown(samples)
    return finish("soak", _figures(tally, samples, growths, after), _bars(tally, growths, after), as_json=as_json)


async def _soak(
    system: Deployment, wanted: Sequence[Script], seconds: float, users: int, seed: int
) -> tuple[Tally, list[Sample], Aftermath]:
    await system.wait_until_up()
    clients = Clients([front.address for front in system.fronts])
    tally, samples, stop = Tally(), list[Sample](), asyncio.Event()
    try:
        expected = await undisturbed(clients, wanted)
        before = {part.name: part.use() for part in system.parts}

        async def watch() -> None:
            began_s = time.monotonic()
            while (at_s := time.monotonic() - began_s) < seconds:
                samples.append(Sample(at_s, tally.turns, _uses(system)))
                await asyncio.sleep(seconds / _NUM_SAMPLES)
            stop.set()

        talking = keep_talking(
            clients, wanted, expected, tally, speakers=users, fault=lambda: "nothing", stop=stop, seed=seed
        )
        await asyncio.gather(watch(), talking)
    finally:
        await clients.aclose()
    return tally, samples, await settled(system, before)


def _uses(system: Deployment) -> dict[str, Use]:
    """Of every process but the proxy; the users live in this one."""
    parts = {part.name: part.use() for part in system.parts}
    return parts | {"redis": use_of(system.redis.pid), "users": use_of(os.getpid())}


def grown(samples: Sequence[Sample]) -> dict[str, Growth]:
    """Fit a line through each process's memory once it is warm. Raises ValueError where that leaves too few samples."""
    counts = [sample for sample in samples if sample.at_s >= _WARM_UP * samples[-1].at_s]
    if len(counts) < 3 or counts[-1].turns == counts[0].turns:
        raise ValueError(f"too short to tell: {len(counts)} samples, {counts[-1].turns - counts[0].turns} turns")
    return {name: _growth(counts, name) for name in counts[0].uses}


def _growth(samples: Sequence[Sample], name: str) -> Growth:
    """By the line of Theil and Sen, the median of all slopes between two samples: no peak or dip moves it."""
    seconds = [sample.at_s for sample in samples]
    mib = [sample.uses[name].memory_bytes / _MIB for sample in samples]
    pairs = itertools.combinations(zip(seconds, mib, strict=True), 2)
    per_s = statistics.median((later - sooner) / (end - start) for (start, sooner), (end, later) in pairs)
    rise = per_s * (seconds[-1] - seconds[0])
    return Growth(
        course_mib=[round(mib[index * (len(mib) - 1) // 10], 1) for index in range(11)],
        rise_mib=rise,
        mib_per_hour=per_s * 3600,
        mib_per_thousand_turns=1000 * rise / (samples[-1].turns - samples[0].turns),
        descriptors=max(sample.uses[name].descriptors for sample in samples),
    )


def _figures(
    tally: Tally, samples: Sequence[Sample], growths: Mapping[str, Growth], after: Aftermath
) -> dict[str, Any]:
    return {
        "conversations": tally.conversations,
        "turns": tally.turns,
        "tokens": tally.tokens,
        "turns_per_s": samples[-1].turns / samples[-1].at_s,
        "slowest_turn_s": tally.slowest_turn_s,
        "wrong_tokens": tally.wrong_tokens,
        "failures": dict(tally.failures + tally.other_failures),
        "problems": tally.problems,
        "unbalanced": after.unbalanced,
        "grown_descriptors": after.grown_descriptors,
        "processes": {name: asdict(growth) for name, growth in growths.items()},
    }


def _bars(tally: Tally, growths: Mapping[str, Growth], after: Aftermath) -> list[Bar]:
    return [
        at_least("turns", tally.turns, 1),
        at_most("wrong tokens", tally.wrong_tokens, 0),
        at_most("failed calls", (tally.failures + tally.other_failures).total(), 0),
        at_most("other problems", len(tally.problems), 0),
        at_most("workers whose blocks don't balance", len(after.unbalanced), 0),
        at_most("descriptors more than before", after.grown_descriptors, SPARE_DESCRIPTORS),
        *(at_most(f"MiB more of {name}", growth.rise_mib, _FLAT_MIB) for name, growth in growths.items()),
    ]
