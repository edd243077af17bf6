"""Conversations under a seeded storm of faults: every token, every turn and every block is accounted for afterwards."""

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from benchmarks.chaos_faults import KINDS, Recovery, Storm
from benchmarks.chaos_load import Clients, Script, Tally, keep_talking, scripts, undisturbed
from benchmarks.chaos_part import Use, Worker
from benchmarks.chaos_parts import Deployment, deployment
from benchmarks.harness import Bar, at_least, at_most, finish

_SPEAKERS = 6
_SETTLE_S = 30.0
SPARE_DESCRIPTORS = 16
"""Connections that come and go: to clients, to Redis, of a scrape."""
_SPARE_BYTES = 64 << 20
"""What an allocator keeps for the next time."""


class Aftermath(NamedTuple):
    """What is wrong when the storm is over, by part; empty where nothing is."""

    unbalanced: dict[str, str]
    grown_descriptors: int
    """By how many more than at the start, at the worst part."""
    grown_bytes: int


def run(
    *,
    minutes: float = 10.0,
    seed: int = 1,
    conversations: int = 24,
    ray: bool = False,
    sealed: bool = False,
    as_json: bool = False,
) -> int:
    """Break two workers, two front ends and their Redis again and again, while users hold conversations with them.

    What each conversation should say is known from an undisturbed run before.

    Args:
        minutes: How long faults strike, one at a time; every kind comes once at least.
        seed: Of faults, dialogues and users.
        conversations: Different dialogues; users take them in turn.
        ray: Workers are Ray actors, which Ray starts again; else processes.
        sealed: Records and blocks are encrypted.
        as_json: Print one JSON object.
    """
    wanted = scripts(conversations, seed=seed)
    tally = Tally()
    with deployment(seed=seed, on_ray=ray, sealed=sealed) as system:
        recoveries, aftermath = asyncio.run(_endure(system, wanted, tally, minutes * 60, seed))
    return finish("chaos", _figures(tally, recoveries, aftermath), _bars(tally, recoveries, aftermath), as_json=as_json)


async def _endure(
    system: Deployment, wanted: Sequence[Script], tally: Tally, seconds: float, seed: int
) -> tuple[list[Recovery], Aftermath]:
    await system.wait_until_up()
    clients = Clients([front.address for front in system.fronts])
    try:
        expected = await undisturbed(clients, wanted)
        before = {part.name: part.use() for part in system.parts}
        storm = Storm(system, clients, seed=seed)
        stop = asyncio.Event()

        async def rage() -> None:
            try:
                await storm.rage(time.monotonic() + seconds)
            finally:
                stop.set()

        talking = keep_talking(
            clients, wanted, expected, tally, speakers=_SPEAKERS, fault=lambda: storm.now, stop=stop, seed=seed
        )
        await asyncio.gather(rage(), talking)
    finally:
        await clients.aclose()
    return storm.recoveries, await settled(system, before)


async def settled(system: Deployment, before: dict[str, Use]) -> Aftermath:
    """Look when all is quiet. What still shrinks is waited for."""
    give_up_s = time.monotonic() + _SETTLE_S
    while True:
        now = {part.name: part.use() for part in system.parts}
        descriptors = max(now[name].descriptors - before[name].descriptors for name in now)
        grown_bytes = max(now[name].memory_bytes - before[name].memory_bytes for name in now)
        if descriptors <= SPARE_DESCRIPTORS or time.monotonic() > give_up_s:
            break
        await asyncio.sleep(0.5)
    unbalanced = {worker.name: problem for worker in system.workers if (problem := await _check(worker))}
    return Aftermath(unbalanced, descriptors, grown_bytes)


async def _check(worker: Worker) -> str:
    return await asyncio.to_thread(worker.check)


def _figures(tally: Tally, recoveries: Sequence[Recovery], aftermath: Aftermath) -> dict[str, Any]:
    figures: dict[str, Any] = {
        **asdict(tally),
        "faults": len(recoveries),
        "unbalanced": aftermath.unbalanced,
        "grown_descriptors": aftermath.grown_descriptors,
        "grown_mib": aftermath.grown_bytes / 2**20,
        "failures": dict(sorted(tally.failures.items())),
        "other_failures": dict(sorted(tally.other_failures.items())),
    }
    for kind in KINDS:
        these = [recovery for recovery in recoveries if recovery.kind == kind]
        if these:
            figures[kind] = {
                "count": len(these),
                "turn_median_s": round(statistics.median(recovery.turn_s for recovery in these), 2),
                "turn_most_s": round(max(recovery.turn_s for recovery in these), 2),
                "whole_median_s": round(statistics.median(recovery.whole_s for recovery in these), 2),
                "whole_most_s": round(max(recovery.whole_s for recovery in these), 2),
                "turns_failed": sum(count for name, count in tally.failures.items() if name.startswith(f"{kind}: ")),
            }
    return figures


def _bars(tally: Tally, recoveries: Sequence[Recovery], aftermath: Aftermath) -> list[Bar]:
    return [
        at_least("faults", len(recoveries), 1),
        at_least("turns", tally.turns, 1),
        at_most("wrong tokens", tally.wrong_tokens, 0),
        at_most("lost turns", tally.lost_turns, 0),
        at_most("doubled turns", tally.doubled_turns, 0),
        at_most("stuck calls", tally.stuck, 0),
        at_most("other problems", len(tally.problems), 0),
        at_most("workers whose blocks don't balance", len(aftermath.unbalanced), 0),
        at_most("descriptors more than before", aftermath.grown_descriptors, SPARE_DESCRIPTORS),
        at_most("MiB more than before", aftermath.grown_bytes / 2**20, _SPARE_BYTES / 2**20),
    ]
