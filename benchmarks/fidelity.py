"""What a conversation loses when its KV is parked and comes back, codec by codec: `rekindle eval fidelity`."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.fidelity_arms import Arm, Parking, Setup, hold_all
from benchmarks.fidelity_figures import CodecFigures, Drift, bars, judge
from benchmarks.harness import finish
from cache_store.codecs import CODECS, RAW, named
from cache_store.errors import ServingError
from models.dialogues import held_out
from rekindle.errors import RekindleError
from rekindle.signals import StopSignals
from server.logs import set_up_logs
from worker.config import ConfigError
from worker.model.shipped import locate

_SUMMARY_HEADS: Final = (
    *("codec", "times\nsmaller", "with\ntails", "encode\nGB/s", "decode\nGB/s", "equal\ntokens", "equal\nreplies"),
    *("exact\nanswers", "undis-\nturbed", "failed\naudits"),
)
_DRIFT_HEADS: Final = ("codec", "resumes", "turns", "tokens", "same\ntop", "mean\nKL", "max\nKL", "NLL\ndrift")
_PARKINGS: Final = (Parking.EVERY_TURN, Parking.ONCE, Parking.OFTEN)
_EVERY_CODEC = tuple(info.name for info in CODECS)
_RECALL = "rekindle-recall"


def evaluate(
    *,
    model: str = _RECALL,
    codec: Sequence[str] = _EVERY_CODEC,
    dialogues: int = 12,
    max_tokens: int = 768,
    max_new_tokens: int = 48,
    block_tokens: int = 64,
    cache_bytes: int = 256 << 20,
    seed: int = 0,
    as_json: bool = False,
) -> int:
    """Hold dialogues undisturbed, and with a park and a full drop before every turn, and compare.

    Every dialogue is held by the real server (front end, worker and Redis), which generates each reply, greedily. Two
    more runs of each codec are parked before the last turn alone, once and over and over: what a conversation loses
    must not grow with resumes.

    Args:
        model: Model directory, or preset:NAME for a shape with random weights. Of rekindle-recall, the project's own,
            all is asked that the codecs promise.
        codec: Codecs to judge, of raw, lossless, int8, k8v4 and int4.
        dialogues: Held-out dialogues.
        max_tokens: Length of each, about.
        max_new_tokens: The longest reply.
        block_tokens: Tokens in a block, small enough that most of a dialogue lies in full ones: unfull ones are exact.
        cache_bytes: Room on the device, and as much in host memory: for the longest dialogue.
        seed: Of the dialogues.
        as_json: Print one JSON object.
    """
    try:
        if dialogues < 1:
            raise ConfigError(f"dialogues must be at least 1, got {dialogues}")
        names = [named(name).name for name in dict.fromkeys(codec)]
        setup = Setup(
            model=model,
            dialogues=held_out(dialogues, seed=seed, max_tokens=max_tokens),
            max_new_tokens=max_new_tokens,
            block_tokens=block_tokens,
            cache_bytes=cache_bytes,
        )
        set_up_logs("auto", "error")
        judged = asyncio.run(_until_stopped(setup, names, quiet=as_json))
    except (ServingError, RekindleError, OSError, ValueError) as error:
        raise SystemExit(f"rekindle: {error}") from error
    if judged is None:
        return 130
    on_recall = Path(locate(model)).resolve() == Path(locate(_RECALL)).resolve()
    figures: dict[str, Any] = {"model": Path(model).name, "dialogues": dialogues, "turns": setup.num_turns}
    figures |= {"max_tokens": max_tokens, "max_new_tokens": max_new_tokens, "block_tokens": block_tokens, "seed": seed}
    if as_json:
        figures["codecs"] = [asdict(one) for one in judged]
    else:
        _print(judged, Console())
    held = [bar for one in judged for bar in bars(one, on_recall=on_recall)]
    return finish("fidelity", figures, held, as_json=as_json)


async def _until_stopped(setup: Setup, codecs: Sequence[str], *, quiet: bool) -> list[CodecFigures] | None:
    """Judge every codec; None where a signal has stopped it."""
    with StopSignals():
        return await _judge_all(setup, codecs, quiet=quiet)
    return None


async def _judge_all(setup: Setup, codecs: Sequence[str], *, quiet: bool) -> list[CodecFigures]:
    with Progress(console=Console(stderr=True), disable=quiet, transient=True) as progress:
        task = progress.add_task("", total=setup.num_turns * (1 + len(_PARKINGS) * len(codecs)))

        def on_turn() -> None:
            progress.advance(task)

        undisturbed = await hold_all(setup, RAW.name, Parking.NEVER, on_turn)
        raw: Arm | None = None
        judged = []
        for codec in sorted(codecs, key=lambda name: named(name).id):  # raw first: what is exact is compared to it
            progress.update(task, description=codec)
            arms = {parking: await hold_all(setup, codec, parking, on_turn) for parking in _PARKINGS}
            judged.append(judge(setup.dialogues, undisturbed, arms, raw))
            raw = arms[Parking.EVERY_TURN] if codec == RAW.name else raw
    return judged


def _print(judged: Sequence[CodecFigures], console: Console) -> None:
    """A line for each codec, then its drift by how often the sessions had been resumed."""
    summary = _table("What a restored conversation loses", _SUMMARY_HEADS)
    by_resumes = _table("Drift from the same turns computed from their tokens, in nats", _DRIFT_HEADS)
    for figures in judged:
        summary.add_row(
            figures.codec,
            f"{figures.ratio:.2f}",
            f"{figures.ratio_of_all:.2f}",
            f"{figures.encode_gb_s:.2f}",
            f"{figures.decode_gb_s:.2f}",
            f"{figures.agreement.tokens:.1%}",
            f"{figures.agreement.replies:.1%}",
            f"{figures.accuracy:.1%}",
            f"{figures.undisturbed_accuracy:.1%}",
            f"{figures.failed_audits}/{figures.resumed_turns}",
        )
        rows = figures.drift_by_resumes | {
            "last of all": figures.last_turn,
            "its only one": figures.last_turn_resumed_once,
        }
        for resumes, drift in rows.items():
            by_resumes.add_row(figures.codec, resumes, *_drift_cells(drift))
        by_resumes.add_section()
    console.print(summary, by_resumes)


def _table(title: str, heads: Iterable[str]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=0, show_edge=False)
    for head in heads:
        table.add_column(head, justify="left" if head in ("codec", "resumes") else "right", no_wrap=True)
    return table


def _drift_cells(drift: Drift) -> list[str]:
    return [
        str(drift.turns),
        str(drift.tokens),
        str(drift.agreeing_tokens),
        f"{drift.mean_kl:.2e}",
        f"{drift.max_kl:.2e}",
        f"{drift.nll_drift:+.2e}",
    ]
