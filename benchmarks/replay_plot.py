"""Figures of replays as PNG. The only file that needs matplotlib, an optional extra."""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.replay_arms import Arm
from benchmarks.replay_report import (
    PERCENTILES,
    SOURCES,
    best_rate,
    by_turn,
    hit_rate,
    percentiles,
    plans_of,
    tokens_by_source,
    tpots,
)

Arms = Mapping[str, Arm]
_MARKERS = {"load": "o", "compute": "^", "both_ends": "s"}


class PlotsMissing(ImportError):
    """Plots were asked for, and matplotlib is not installed."""


def load_plots() -> Callable[[Arms, Path], list[Path]]:
    """What draws all figures into a directory and returns their files. Raises PlotsMissing."""
    if find_spec("matplotlib") is None:
        raise PlotsMissing("plots need matplotlib: pip install rekindle[plot]")
    return _draw_all


def _draw_all(arms: Arms, folder: Path) -> list[Path]:
    from matplotlib.figure import Figure  # no pyplot: that keeps figures, and looks for a display

    folder.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[Any, Arms], None]] = {
        "ttft_by_turn": lambda axes, given: _times(axes, given, "time to first token, s", lambda one: [one.ttft_s]),
        "tpot_by_turn": lambda axes, given: _times(axes, given, "time per further token, s", lambda one: tpots([one])),
        "tokens_by_source": _sources,
        "hit_rate": _hit_rates,
        "moved_bytes": _moved,
        "lost_blocks": _lost,
        "plans": _plans,
    }
    files = []
    for name, draw in drawings.items():
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        draw(figure.subplots(), arms)
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=120)
    return files


def _times(axes: Any, arms: Arms, label: str, of_one: Callable[[Any], Sequence[float]]) -> None:
    """A line for each arm's median, with the other percentiles above it, fainter."""
    for number, (name, arm) in enumerate(arms.items()):
        values = {
            turn: [each for one in members for each in of_one(one)] for turn, members in by_turn(arm.served).items()
        }
        rows = {turn: percentiles(given) for turn, given in values.items() if given}
        for fainter, percent in enumerate(PERCENTILES):
            axes.plot(
                list(rows),
                [row[f"p{percent}"] for row in rows.values()],
                color=f"C{number}",
                alpha=1 / (1 + fainter),
                marker="o",
                label=f"{name}, p{percent}",
            )
    axes.set(xlabel="turn", ylabel=label, yscale="log")
    _legend(axes)


def _sources(axes: Any, arms: Arms) -> None:
    bottom = [0] * len(arms)
    for source in SOURCES:
        tokens = [tokens_by_source(arm.served)[source] for arm in arms.values()]
        axes.bar(list(arms), tokens, bottom=bottom, label=source)
        bottom = [below + more for below, more in zip(bottom, tokens, strict=True)]
    axes.set(ylabel="prompt tokens")
    _legend(axes)


def _hit_rates(axes: Any, arms: Arms) -> None:
    infinite = {name: arm.ideal.infinite / arm.ideal.prompt_tokens for name, arm in arms.items()}
    achieved = {name: hit_rate(arm) for name, arm in arms.items()}
    best = {name: best_rate(arm) for name, arm in arms.items()}
    _beside(axes, {"achieved": achieved, "best possible for the sizes": best, "infinite cache": infinite})
    axes.set(ylabel="hit rate", ylim=(0, 1))


def _moved(axes: Any, arms: Arms) -> None:
    ways = sorted({way for arm in arms.values() for way in arm.below.moved_bytes})
    _beside(axes, {way: {name: arm.below.moved_bytes[way] / 1e9 for name, arm in arms.items()} for way in ways})
    axes.set(ylabel="moved, GB")


def _lost(axes: Any, arms: Arms) -> None:
    dropped = {name: float(arm.below.stores_dropped) for name, arm in arms.items()}
    needed = {name: float(arm.below.evicted_then_needed) for name, arm in arms.items()}
    _beside(axes, {"stores dropped": dropped, "evicted from the device, then needed": needed})
    axes.set(ylabel="blocks")


def _plans(axes: Any, arms: Arms) -> None:
    """Each plan's outcome beside what it promised: on the line where it kept its word."""
    for number, (name, arm) in enumerate(arms.items()):
        for kind, plans in plans_of(arm.served).items():
            predicted, actual = [plan.predicted_ms for plan in plans], [plan.actual_ms for plan in plans]
            axes.scatter(predicted, actual, color=f"C{number}", marker=_MARKERS.get(kind, "x"), label=f"{name}, {kind}")
            axes.plot([*predicted, *actual], [*predicted, *actual], color="0.8", zorder=0)
    axes.set(xlabel="predicted, ms", ylabel="actual, ms")
    if axes.collections:
        axes.set(xscale="log", yscale="log")
        _legend(axes)


def _beside(axes: Any, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Bars of several rows beside each other, one group for each arm."""
    width = 0.8 / max(1, len(rows))
    for number, (label, row) in enumerate(rows.items()):
        axes.bar([group + number * width for group in range(len(row))], list(row.values()), width, label=label)
        axes.set_xticks([group + 0.4 - width / 2 for group in range(len(row))], list(row))
    if rows:
        _legend(axes)


def _legend(axes: Any) -> None:
    """Beside the figure: within it, it would hide some of it."""
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
