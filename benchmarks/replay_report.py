"""What a replay says of itself, in figures: times by turn, tokens by source, hits beside what was possible."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.replay_arms import Arm
from benchmarks.replay_drive import Served
from protos import rekindle_pb2 as pb

Begin = Callable[[str, int], Callable[[], object]]

SOURCES = ("device", "host", "disk", "redis", "computed")
PERCENTILES = (50, 90, 99)
_TURN_GROUPS = ((1, 1), (2, 2), (3, 3), (4, 7), (8, None))


def hit_rate(arm: Arm) -> float:
    """Share of the prompts' tokens whose KV was found in any tier."""
    return _found_share(tokens_by_source(arm.served))


def best_rate(arm: Arm) -> float:
    """The most that tiers of the arm's sizes could have found."""
    return arm.ideal.best / arm.ideal.prompt_tokens


def plans_of(served: Iterable[Served]) -> dict[str, list[pb.RestorePlan]]:
    """The plans of turns that had something to restore, by kind."""
    plans: dict[str, list[pb.RestorePlan]] = {}
    for one in served:
        if one.receipt.HasField("plan"):
            kind = pb.PlanKind.Name(one.receipt.plan.kind).removeprefix("PLAN_KIND_").lower()
            plans.setdefault(kind, []).append(one.receipt.plan)
    return plans


def mean_ttft_s(served: Iterable[Served]) -> float:
    return float(np.mean([one.ttft_s for one in served]))


def by_turn(served: Sequence[Served]) -> dict[str, list[Served]]:
    """Requests by turn number, late turns together."""
    groups = {}
    for first, last in _TURN_GROUPS:
        name = f"{first}" if first == last else f"{first}-{last}" if last else f"{first}+"
        groups[name] = [one for one in served if first <= one.request.turn and (not last or one.request.turn <= last)]
    return {name: members for name, members in groups.items() if members}


def percentiles(values: Iterable[float]) -> dict[str, float]:
    given = list(values)
    return {f"p{percent}": float(np.percentile(given, percent)) for percent in PERCENTILES} if given else {}


def tokens_by_source(served: Iterable[Served]) -> dict[str, int]:
    sums = dict.fromkeys(SOURCES, 0)
    for one in served:
        for source in SOURCES:
            sums[source] += getattr(one.receipt, f"{source}_tokens")
    return sums


def figures_of(arm: Arm) -> dict[str, Any]:
    """All of it, ready for JSON."""
    served, below, prompt_tokens = arm.served, arm.below, arm.ideal.prompt_tokens
    misses: Counter[str] = Counter()
    for one in served:
        for miss in one.receipt.misses:
            misses[pb.MissReason.Name(miss.reason).removeprefix("MISS_REASON_").lower()] += miss.tokens
    return {
        "tier bytes": arm.sizes._asdict(),
        "seconds": max(one.end_s for one in served),
        "sent late by at most, s": max(one.sent_s - one.due_s for one in served),
        "hit rate": hit_rate(arm),
        "hit rate, best possible for the sizes": best_rate(arm),
        "hit rate, one LRU of the sizes' sum": arm.ideal.lru / prompt_tokens,
        "hit rate, infinite cache": arm.ideal.infinite / prompt_tokens,
        "mean ttft, s": mean_ttft_s(served),
        "mean ttft from sending, s": float(np.mean([one.ttft_of_server_s for one in served])),
        "mean ttft of later turns, s": mean_ttft_s([one for one in served if one.request.turn > 1] or served),
        "ttft, s": percentiles(one.ttft_s for one in served),
        "tpot, s": percentiles(tpots(served)),
        "tokens by source": tokens_by_source(served),
        "computed tokens by reason": dict(misses.most_common()),
        "moved bytes": dict(below.moved_bytes),
        "stores dropped, blocks": below.stores_dropped,
        "evicted then needed, blocks": below.evicted_then_needed,
        "lost tokens": lost_tokens(arm),
        "plans": {kind: _figures_of_plans(plans) for kind, plans in plans_of(served).items()},
        "by turn": {turn: _figures_of_turn(members) for turn, members in by_turn(served).items()},
    }


def tpots(served: Iterable[Served]) -> list[float]:
    return [tpot for one in served if (tpot := one.tpot_s) is not None]


def _found_share(tokens: dict[str, int]) -> float:
    return (sum(tokens.values()) - tokens["computed"]) / sum(tokens.values())


def lost_tokens(arm: Arm) -> int:
    """Tokens that were computed although a prompt before had them: the prompts' own receipts can't tell."""
    found = arm.ideal.prompt_tokens - tokens_by_source(arm.served)["computed"]
    return arm.ideal.infinite - found


def _figures_of_plans(plans: Sequence[pb.RestorePlan]) -> dict[str, Any]:
    return {
        "turns": len(plans),
        "predicted ms, median": float(np.median([plan.predicted_ms for plan in plans])),
        "actual ms, median": float(np.median([plan.actual_ms for plan in plans])),
        "actual over predicted": percentiles(plan.actual_ms / plan.predicted_ms for plan in plans if plan.predicted_ms),
        "tokens computed instead": sum(plan.computed_instead_tokens for plan in plans),
    }


def _figures_of_turn(served: Sequence[Served]) -> dict[str, Any]:
    tokens = tokens_by_source(served)
    return {
        "requests": len(served),
        "mean ttft, s": mean_ttft_s(served),
        "ttft, s": percentiles(one.ttft_s for one in served),
        "tpot, s": percentiles(tpots(served)),
        "tokens by source": tokens,
        "hit rate": _found_share(tokens),
    }


@contextmanager
def progress(*, quiet: bool) -> Iterator[Begin]:
    """A bar for each part of a benchmark: call with its name and number of steps, then the answer after each step."""
    with Progress(console=Console(stderr=True), disable=quiet, transient=True) as bars:

        def begin(name: str, steps: int) -> Callable[[], object]:
            task = bars.add_task(name, total=steps)
            return lambda: bars.advance(task)

        yield begin


def show(name: str, figures: dict[str, Any]) -> None:
    """Print one arm: its figures, then a table by turn number."""
    console = Console()
    plain = Table("figure", "value", title=name)
    for key, value in figures.items():
        if key != "by turn":
            plain.add_row(key, _text(value))
    console.print(plain)
    table = Table("turn", "requests", "ttft p50/p90/p99, s", "tpot p50/p90/p99, ms", "hit rate", *SOURCES)
    for turn, row in figures["by turn"].items():
        table.add_row(
            turn,
            str(row["requests"]),
            _row(row["ttft, s"], lambda seconds: f"{seconds:.2f}"),
            _row(row["tpot, s"], lambda seconds: f"{seconds * 1e3:.0f}"),
            f"{row['hit rate']:.3f}",
            *(str(row["tokens by source"][source]) for source in SOURCES),
        )
    console.print(table)


def _row(values: dict[str, float], text: Callable[[float], str]) -> str:
    return " / ".join(text(value) for value in values.values()) or "-"


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "  ".join(f"{key} {_text(each)}" for key, each in value.items()) or "-"
    return str(value)
