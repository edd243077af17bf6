"""What is remembered of conversations many windows long, and at what cost: `rekindle eval recall`."""

import asyncio
import math
import statistics
from collections.abc import Sequence
from functools import partial
from itertools import combinations_with_replacement
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.fidelity_arms import system
from benchmarks.harness import Bar, at_least, at_most, finish
from benchmarks.recall_codecs import Kept, keep
from benchmarks.recall_holding import Held, Holder, Setup
from benchmarks.recall_talks import facts
from cache_store.codecs import EXACT, fidelity_of
from cache_store.errors import ServingError
from models.encoding import measure
from rekindle.errors import RekindleError
from rekindle.signals import StopSignals
from server.logs import set_up_logs
from worker.config import ConfigError, WorkerConfig
from worker.model.shipped import locate

_SHARE: Final = 0.9
"""Of what the model knows inside its window, RECALL has to know as much however long ago it was."""
_NEAR_ZERO: Final = 0.1
_SLOWER: Final = 1.3
"""A token under RECALL may take so many times as long as under WINDOW."""
_FLAT: Final = 1.3
"""The last turns may take so many times as long as the first ones beyond the window."""


def evaluate(
    *,
    model: str = "rekindle-recall",
    window: int = 2048,
    recall_tokens: int = 0,
    windows: Sequence[int] = (1, 4, 16, 64),
    singles: int = 48,
    corrected: int = 16,
    pairs: int = 12,
    other_facts: float = 0.03,
    turn_tokens: int = 1024,
    block_tokens: int = 64,
    device_cache_bytes: int = 32 << 20,
    codec: Sequence[str] = (),
    window_s: int = 300,
    seed: int = 0,
    as_json: bool = False,
) -> int:
    """Tell facts, some of them corrected later, talk of other things for many windows, and ask for all of them.

    Held by the real server (front end, worker and Redis), greedily: once with each of the policies WINDOW and RECALL,
    and with the same facts in conversations that fit the window. What is told comes in turns of several messages. The
    model answers the last question of a message: two facts are asked for in both orders, and both have to be right.

    Args:
        model: Model directory; of rekindle-recall, the project's own, all is asked.
        window: Positions that the model uses.
        recall_tokens: How many of them are for what is recalled; 0: the server's default.
        windows: How many windows before the questions facts are told.
        singles: Facts told once, over all distances.
        corrected: Facts told and corrected later, over all distances.
        pairs: Pairs of further facts, at different distances, that are asked for in one message.
        other_facts: Share of the facts about others that the small talk keeps, 0 to 1.
        turn_tokens: Length of the turns that tell, about.
        block_tokens: Tokens in a block of KV.
        device_cache_bytes: Room for KV on the device.
        codec: Codecs, of raw, lossless, int8, k8v4, int4 and ladder, in which what was told is then kept as well, in
            Redis alone, until another worker is asked for it.
        window_s: Seconds that a window of talk is said to have taken: a ladder session's blocks are so old.
        seed: Of the conversations.
        as_json: Print one JSON object.
    """
    try:
        _check(singles, corrected, pairs, windows, other_facts, window_s)
        codecs = list(dict.fromkeys(codec))
        for name in codecs:
            fidelity_of(name)
        told = facts(str(seed), singles=singles + 2 * pairs, corrected=corrected)
        setup = Setup(
            window=window,
            windows=tuple(dict.fromkeys(windows)),
            told=[*told[:singles], *told[singles + 2 * pairs :]],
            told_in_pairs=told[singles : singles + 2 * pairs],
            other_facts=other_facts,
            turn_tokens=turn_tokens,
            seed=seed,
            measure=partial(measure, AutoTokenizer.from_pretrained(locate(model))),
        )
        config = WorkerConfig(
            model=model,
            block_tokens=block_tokens,
            context_tokens=window,
            recall_tokens=recall_tokens,
            device_cache_bytes=device_cache_bytes,
            host_cache_bytes=1 << 30,
        )
        set_up_logs("auto", "error")
        report = asyncio.run(_until_stopped(setup, config, codecs, window_s, quiet=as_json))
    except (ServingError, RekindleError, OSError, ValueError) as error:
        raise SystemExit(f"rekindle: {error}") from error
    if report is None:
        return 130
    held, kept = report
    figures = {"window": window, "other_facts": other_facts, **_figures(setup, held, kept)}
    if not as_json:
        _print(setup, held, kept, Console())
    return finish("recall", figures, _bars(setup, held, kept), as_json=as_json)


def _check(singles: int, corrected: int, pairs: int, windows: Sequence[int], other_facts: float, window_s: int) -> None:
    """Raises ConfigError."""
    if singles < 1 or min(corrected, pairs, window_s) < 0:
        raise ConfigError(
            "need singles >= 1, corrected >= 0, pairs >= 0 and window_s >= 0, "
            f"got {singles}, {corrected}, {pairs}, {window_s}"
        )
    if not windows or min(windows) < 1 or not 0.0 <= other_facts <= 1.0:
        raise ConfigError(
            f"need windows >= 1 and other_facts from 0 to 1, got windows={list(windows)}, other_facts={other_facts}"
        )


_Report = tuple[dict[str, Held], list[Kept]]
"""What was held undisturbed, by policy, and what was kept in each codec."""


async def _until_stopped(
    setup: Setup, config: WorkerConfig, codecs: Sequence[str], window_s: int, *, quiet: bool
) -> _Report | None:
    """Hold all conversations; None where a signal has stopped it."""
    with StopSignals():
        return await _hold_all(setup, config, codecs, window_s, quiet=quiet)
    return None


async def _hold_all(
    setup: Setup, config: WorkerConfig, codecs: Sequence[str], window_s: int, *, quiet: bool
) -> _Report:
    held = {name: Held() for name in ("error", "window", "recall")}
    within, beyond = setup.within(), setup.beyond()
    with Progress(console=Console(stderr=True), disable=quiet, transient=True) as progress:
        num_turns = sum(map(setup.num_turns, within)) + (2 + len(codecs)) * setup.num_turns(beyond)
        task = progress.add_task("", total=num_turns)

        def on_turn() -> None:
            progress.advance(task)

        for policy, one in [*(("error", one) for one in within), ("window", beyond), ("recall", beyond)]:
            progress.update(task, description=policy)
            await _hold(config, policy, Holder(setup, one, held[policy], on_turn))
        kept = []
        for codec in codecs:
            progress.update(task, description=codec)
            kept.append(await keep(setup, config, codec, window_s=window_s, on_turn=on_turn))
    return held, kept


async def _hold(config: WorkerConfig, policy: str, holder: Holder) -> None:
    async with system(config) as (client, _, _):
        session_id = (await client.create_session(context_policy=policy)).session_id
        await holder.tell(client, session_id)
        await holder.ask(client, session_id)


def _figures(setup: Setup, held: dict[str, Held], kept: Sequence[Kept]) -> dict[str, Any]:
    figures: dict[str, Any] = {"inside the window": held["error"].accuracy()}
    for policy, name in (("error", "inside the window"), ("window", "window"), ("recall", "recall")):
        one = held[policy]
        if one.outdated:
            figures[f"{name}, corrected facts"] = one.accuracy(corrected=True)
            figures[f"{name}, corrected facts' old values"] = one.outdated_share()
        if one.pairs:
            figures[f"{name}, pairs"] = one.pair_accuracy()
    for policy in ("window", "recall"):
        one = held[policy]
        figures |= {f"{policy}, {windows} windows back": one.accuracy(windows) for windows in setup.windows}
        figures[f"{policy}, median turn (s)"] = statistics.median(one.turn_s)
        figures[f"{policy}, last turns to first ones"] = one.growth
        figures[f"{policy}, ms a token"] = statistics.median(one.token_ms)
        figures[f"{policy}, most KV on the device (MiB)"] = max(one.device_bytes, default=0) / (1 << 20)
    for one_kept in kept:
        codec = one_kept.codec
        for windows, at in one_kept.at.items():
            name = f"{codec}, {windows} windows back" + ("" if at == codec else f" ({at})")
            figures[name] = one_kept.held.accuracy(windows)
        if one_kept.held.pairs:
            figures[f"{codec}, pairs"] = one_kept.held.pair_accuracy()
        figures[f"{codec}, replies as if never parked"] = _agreement(one_kept, held["recall"])
        figures[f"{codec}, the first answer's first token (s)"] = one_kept.held.ttft_ms[0] / 1e3
        figures |= {f"{codec}, MiB of KV from {at}": size / (1 << 20) for at, size in sorted(one_kept.restored.items())}
    return figures


def _agreement(kept: Kept, undisturbed: Held) -> float:
    """Share of the answers that are those of the conversation which stayed with its worker."""
    return statistics.mean(one == other for one, other in zip(kept.held.replies, undisturbed.replies, strict=True))


def _bars(setup: Setup, held: dict[str, Held], kept: Sequence[Kept]) -> list[Bar]:
    inside, recall = held["error"], held["recall"]
    slower = statistics.median(recall.token_ms) / statistics.median(held["window"].token_ms)
    bars = [
        at_least(f"RECALL, {one} windows back", recall.accuracy(one), _SHARE * inside.accuracy())
        for one in setup.windows
    ]
    if recall.outdated:
        wanted = _SHARE * inside.accuracy(corrected=True)
        bars.append(at_least("RECALL, corrected facts", recall.accuracy(corrected=True), wanted))
    if recall.pairs:
        bars.append(at_least("RECALL, pairs", recall.pair_accuracy(), _SHARE * inside.pair_accuracy()))
    return [
        *bars,
        at_most("WINDOW", held["window"].accuracy(), _NEAR_ZERO),
        at_most("RECALL: a token, in WINDOW's", slower, _SLOWER),
        at_most("RECALL: the last turns, in the first ones'", recall.growth, _FLAT),
        *(
            at_least(f"{one.codec}: replies as if never parked", _agreement(one, recall), 1)
            for one in kept
            if fidelity_of(one.codec) == EXACT
        ),
    ]


def _print(setup: Setup, held: dict[str, Held], kept: Sequence[Kept], console: Console) -> None:
    heads = ("windows back", "WINDOW", "RECALL", "told once", "corrected", "named the\nold value")
    table, recall = _table("Exactly right answers", heads), held["recall"]
    for one in setup.windows:
        parts = (recall.accuracy(one), recall.accuracy(one, corrected=False), recall.accuracy(one, corrected=True))
        table.add_row(str(one), *map(_percent, (held["window"].accuracy(one), *parts, recall.outdated_share(one))))
    console.print(table)
    if recall.pairs:
        pairs = _table("Two facts asked for in one message: both right", ("windows back", "WINDOW", "RECALL"))
        pairs.add_row("inside the window", "", _percent(held["error"].pair_accuracy()))
        for two in combinations_with_replacement(setup.windows, 2):
            shares = held["window"].pair_accuracy(two), recall.pair_accuracy(two)
            if not any(math.isnan(share) for share in shares):
                pairs.add_row(f"{two[0]} and {two[1]}", *map(_percent, shares))
        console.print(pairs)
    if kept:
        codec_heads = ("kept in", *(f"{one} back" for one in setup.windows), "pairs", "replies as\nif not parked")
        codecs = _table("RECALL by another worker, from Redis alone", codec_heads)
        for one_kept in kept:
            cells = [f"{_percent(one_kept.held.accuracy(at))} {codec}" for at, codec in one_kept.at.items()]
            agreement = _percent(_agreement(one_kept, recall))
            codecs.add_row(one_kept.codec, *cells, _percent(one_kept.held.pair_accuracy()), agreement)
        console.print(codecs)


def _table(title: str, heads: Sequence[str]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=0, show_edge=False)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{share:.1%}"
