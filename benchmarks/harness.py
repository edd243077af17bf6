"""What every benchmark shares: interleaved rounds, medians, bars, and one way to print them."""

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Bar:
    """One figure that an issue asks for."""

    name: str
    value: float
    wanted: str
    holds: bool


def at_least(name: str, value: float, limit: float) -> Bar:
    return Bar(name, value, f">= {limit:g}", value >= limit)


def at_most(name: str, value: float, limit: float) -> Bar:
    return Bar(name, value, f"<= {limit:g}", value <= limit)


def interleaved(
    sides: Mapping[str, Callable[[], float]], *, rounds: int, quiet: bool = False, title: str = ""
) -> dict[str, list[float]]:
    """Measure every side once a round, in turn, so that a drifting machine touches all alike.

    A side returns its own figure (seconds, GB/s, tokens/s). One round before the first is not counted.
    """
    figures: dict[str, list[float]] = {name: [] for name in sides}
    with Progress(console=Console(stderr=True), disable=quiet, transient=True) as progress:
        task = progress.add_task(title or "measuring", total=(rounds + 1) * len(sides))
        for number in range(rounds + 1):
            for name, measure in sides.items():
                progress.update(task, description=f"{title} {name}".strip())
                figure = measure()
                if number > 0:
                    figures[name].append(figure)
                progress.advance(task)
    return figures


def medians(figures: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in figures.items()}


def machine() -> dict[str, Any]:
    """Describe where the figures come from."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory_kib = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": model,
        "cpus": len(_allowed_cpus()),
        "memory_gib": round(memory_kib / 2**20, 1),
        "python": platform.python_version(),
    }


def finish(name: str, figures: Mapping[str, Any], bars: Sequence[Bar], *, as_json: bool) -> int:
    """Print one JSON object, or tables. Returns the exit status: 0 if every bar holds, else 1."""
    holds = all(bar.holds for bar in bars)
    if as_json:
        result = {"benchmark": name, "machine": machine(), "figures": figures, "bars": [asdict(bar) for bar in bars]}
        sys.stdout.write(json.dumps(result) + "\n")
        return 0 if holds else 1
    console = Console()
    table = Table("figure", "value", title=f"{name} on {machine()['cpu']}, {machine()['cpus']} cpus")
    for key, value in figures.items():
        table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)
    if bars:
        wanted = Table("bar", "value", "wanted", "holds")
        for bar in bars:
            wanted.add_row(bar.name, f"{bar.value:.3f}", bar.wanted, "yes" if bar.holds else "[red]no[/red]")
        console.print(wanted)
    return 0 if holds else 1


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


def _allowed_cpus() -> set[int]:
    return os.sched_getaffinity(0)
