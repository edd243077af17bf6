"""Routing at scale, simulated: an index of ten million blocks, and what routing by it gains on a trace."""

from collections.abc import Mapping
from typing import Any

from benchmarks.harness import Bar, at_least, at_most, finish
from benchmarks.ladder_trace import num_distinct, read_trace
from benchmarks.scale_index import measure_index
from benchmarks.scale_routing import INDEX, POOLED, WAYS, Machines, measure_routing, turns_of

_MAX_DECISION_US = 50.0


def run(
    *,
    workers: int = 1000,
    blocks: int = 10_000_000,
    decisions: int = 20_000,
    trace_workers: int = 16,
    device_share: float = 0.1,
    host_share: float = 0.4,
    tokens_per_s: float = 5000.0,
    shared_blocks: int = 16,
    seed: int = 0,
    as_json: bool = False,
) -> int:
    """Fill an index and time it; then route the public trace in five ways. One process, one thread, no GPU.

    Args:
        workers: Workers that the index knows.
        blocks: Blocks of their sessions.
        decisions: Decisions that are timed, each for another session.
        trace_workers: Workers that the trace is routed over.
        device_share: What all their devices together have room for, as a share of the trace's blocks.
        host_share: The same of their host memory.
        tokens_per_s: What one of them computes of prompts.
        shared_blocks: The trace once more, with so many blocks that all prompts begin with.
        seed: Of all that is drawn.
        as_json: Print one JSON object.
    """
    trace = read_trace()
    room = num_distinct(trace) / trace_workers
    machines = Machines(
        num_workers=trace_workers,
        device_blocks=int(device_share * room),
        host_blocks=int(host_share * room),
        token_s=1 / tokens_per_s,
    )
    plain = measure_routing(turns_of(trace), machines, seed=seed)
    shared = measure_routing(turns_of(trace, shared_blocks=shared_blocks), machines, seed=seed)
    index = measure_index(num_workers=workers, num_blocks=blocks, decisions=decisions, seed=seed)
    figures: dict[str, Any] = {
        **index,
        "trace": {"requests": len(trace), "workers": trace_workers, "blocks of device": machines.device_blocks}
        | {"blocks of host": machines.host_blocks},
        **{f"trace, {way}": _rounded(row) for way, row in plain.items()},
        **{f"trace behind {shared_blocks} shared blocks, {way}": _rounded(row) for way, row in shared.items()},
    }
    bars = [at_most("decision p99, us", index["decision p99, us"], _MAX_DECISION_US), *bars_of(plain)]
    return finish("scale", figures, bars, as_json=as_json)


def bars_of(figures: Mapping[str, Mapping[str, float]]) -> list[Bar]:
    """By the index, hits nearly as if all room were one worker's, and shorter waits than any other way."""
    ours, others = figures[INDEX], [figures[way] for way in WAYS if way != INDEX]
    return [
        at_least("hit rate, share of that with all room in one", ours["hit rate"] / figures[POOLED]["hit rate"], 0.95),
        *(
            at_most(f"{name}, against the best other way's", ours[name], min(row[name] for row in others))
            for name in ("wait p99, s", "first token mean, s")
        ),
    ]


def _rounded(row: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in row.items()}
