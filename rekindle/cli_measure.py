"""`rekindle bench` and `rekindle eval`: what benchmarks/ measures and proves, as commands. Imports none of it."""

import ast
from pathlib import Path

from cyclopts import App, Parameter

import benchmarks

_FLAGS = Parameter(
    negative="",
    consume_multiple=True,
    name_transform=lambda name: "json" if name == "as_json" else name.replace("_", "-"),
)
"""How the keyword parameters of what is measured or proved become flags."""


def bench_app() -> App:
    """One command for each module of benchmarks/: the keyword parameters of its `run` are the flags."""
    bench = App(
        name="bench",
        help="Measure. Every benchmark runs both sides in turn and prints medians, and which bars hold.",
        default_parameter=_FLAGS,
    )
    for path in sorted(Path(benchmarks.__path__[0]).glob("*.py")):
        code = ast.parse(path.read_text())  # not imported: most of them bring torch
        if any(isinstance(statement, ast.FunctionDef) and statement.name == "run" for statement in code.body):
            summary = (ast.get_docstring(code) or "").partition("\n")[0]
            bench.command(f"benchmarks.{path.stem}:run", name=path.stem, help=summary)
    return bench


def eval_app() -> App:
    """What proves rather than times. Imported when called: it brings torch."""
    evaluations = App(
        name="eval", help="Prove. Every evaluation says which of its bars hold.", default_parameter=_FLAGS
    )
    evaluations.command(
        "benchmarks.fidelity:evaluate",
        name="fidelity",
        help="What a conversation loses when its cache is parked and comes back, codec by codec.",
    )
    evaluations.command(
        "benchmarks.memory:evaluate",
        name="memory",
        help="How well what was said is found again: by words, by meaning, and as banks do it.",
    )
    evaluations.command(
        "benchmarks.recall:evaluate",
        name="recall",
        help="What is remembered of conversations many windows long, and at what cost.",
    )
    return evaluations
