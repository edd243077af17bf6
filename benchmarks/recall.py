"""What is remembered of conversations many windows long, and at what cost: `rekindle eval recall`."""

import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.fidelity_arms import system
from benchmarks.harness import Bar, at_least, at_most, finish
from benchmarks.recall_talks import Fact, Measure, Placed, Talk, facts, messages, pieces, place, talk
from cache_store.errors import ServingError
from models.dialogues import exact
from models.encoding import measure
from rekindle.client import Client
from rekindle.errors import RekindleError
from rekindle.signals import StopSignals
from server.logs import set_up_logs
from worker.config import ConfigError, WorkerConfig
from worker.model.shipped import locate

_IN_WINDOW: Final = 0.7
"""Windows that the conversations have which the model's answers inside its window are measured in."""
_SHARE: Final = 0.9
"""Of what the model knows inside its window, RECALL has to know as much however long ago it was."""
_NEAR_ZERO: Final = 0.1
_SLOWER: Final = 1.3
"""A token under RECALL may take so many times as long as under WINDOW."""
_FLAT: Final = 1.3
"""The last turns may take so many times as long as the first ones beyond the window."""


@dataclass(slots=True)
class Held:
    """What came of one or more conversations under one policy."""

    right: dict[tuple[float, bool], list[bool]] = field(default_factory=lambda: defaultdict(list))
    """By distance in windows, and whether the fact had been corrected."""
    turn_s: list[float] = field(default_factory=list)
    """Of each turn that told something, in order."""
    token_ms: list[float] = field(default_factory=list)
    """Of each answer: decoding, by token."""
    device_bytes: list[int] = field(default_factory=list)
    """Of KV, after each turn."""

    def accuracy(self, windows: float | None = None, *, corrected: bool | None = None) -> float:
        """Share of exactly right answers, at one distance or all; NaN without questions."""
        found = [
            hit
            for (distance, is_corrected), hits in self.right.items()
            for hit in hits
            if windows in (None, distance) and corrected in (None, is_corrected)
        ]
        return statistics.mean(found) if found else float("nan")

    @property
    def growth(self) -> float:
        """What the last quarter of the turns took, in what the second did: the first is in the window in part."""
        quarter = max(1, len(self.turn_s) // 4)
        return statistics.median(self.turn_s[-quarter:]) / statistics.median(self.turn_s[quarter : 2 * quarter])


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    window: int
    windows: tuple[int, ...]
    told: Sequence[Fact]
    other_facts: float
    turn_tokens: int
    seed: int
    measure: Measure

    def beyond(self) -> Talk:
        """One conversation with facts at all distances."""
        placed = place(self.told, self.windows)
        return self._talk(placed, max(self.windows) + 1.0, "beyond")

    def within(self) -> list[Talk]:
        """The same facts in conversations that fit the window, a few in each."""
        few = [self.told[start : start + 8] for start in range(0, len(self.told), 8)]
        return [self._talk(place(some, (0.05,)), _IN_WINDOW, f"within {number}") for number, some in enumerate(few)]

    def _talk(self, placed: Sequence[Placed], windows: float, name: str) -> Talk:
        return talk(
            placed,
            windows=windows,
            window_tokens=self.window,
            other_facts=self.other_facts,
            seed=f"{self.seed}/{name}",
            measure=self.measure,
        )


def evaluate(
    *,
    model: str = "rekindle-recall",
    window: int = 2048,
    recall_tokens: int = 0,
    windows: Sequence[int] = (1, 4, 16, 64),
    singles: int = 48,
    corrected: int = 16,
    other_facts: float = 0.03,
    turn_tokens: int = 1024,
    block_tokens: int = 64,
    device_cache_bytes: int = 32 << 20,
    seed: int = 0,
    as_json: bool = False,
) -> int:
    """Tell facts, some of them corrected later, talk of other things for many windows, and ask for all of them.

    Held by the real server (front end, worker and Redis), greedily: once with each of the policies WINDOW and RECALL,
    and with the same facts in conversations that fit the window. What is told comes in turns of several messages.

    Args:
        model: Model directory; of rekindle-recall, the project's own, all is asked.
        window: Positions that the model uses.
        recall_tokens: How many of them are for what is recalled; 0: the server's default.
        windows: How many windows before the questions facts are told.
        singles: Facts told once, over all distances.
        corrected: Facts told and corrected later, over all distances.
        other_facts: Share of the facts about others that the small talk keeps, 0 to 1.
        turn_tokens: Length of the turns that tell, about.
        block_tokens: Tokens in a block of KV.
        device_cache_bytes: Room for KV on the device.
        seed: Of the conversations.
        as_json: Print one JSON object.
    """
    try:
        if singles < 1 or corrected < 0 or not windows or min(windows) < 1 or not 0.0 <= other_facts <= 1.0:
            raise ConfigError(
                "need singles >= 1, corrected >= 0, windows >= 1 and other_facts from 0 to 1, "
                f"got {singles}, {corrected}, {list(windows)}, {other_facts}"
            )
        setup = Setup(
            window=window,
            windows=tuple(dict.fromkeys(windows)),
            told=facts(str(seed), singles=singles, corrected=corrected),
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
        held = asyncio.run(_until_stopped(setup, config, quiet=as_json))
    except (ServingError, RekindleError, OSError, ValueError) as error:
        raise SystemExit(f"rekindle: {error}") from error
    if held is None:
        return 130
    figures = {"window": window, "other_facts": other_facts, **_figures(setup, held)}
    if not as_json:
        _print(setup, held, Console())
    return finish("recall", figures, _bars(setup, held), as_json=as_json)


async def _until_stopped(setup: Setup, config: WorkerConfig, *, quiet: bool) -> dict[str, Held] | None:
    """Hold all conversations; None where a signal has stopped it."""
    with StopSignals():
        return await _hold_all(setup, config, quiet=quiet)
    return None


async def _hold_all(setup: Setup, config: WorkerConfig, *, quiet: bool) -> dict[str, Held]:
    held = {name: Held() for name in ("error", "window", "recall")}
    todo = [("error", one) for one in setup.within()] + [(policy, setup.beyond()) for policy in ("window", "recall")]
    with Progress(console=Console(stderr=True), disable=quiet, transient=True) as progress:
        total = sum(len(list(pieces(one.turns, setup.turn_tokens, setup.measure))) + len(one.placed) for _, one in todo)
        task = progress.add_task("", total=total)
        for policy, one in todo:
            progress.update(task, description=policy)
            async with system(config) as (client, _, _):
                await _hold(client, policy, one, setup, held[policy], lambda: progress.advance(task))
    return held


async def _hold(client: Client, policy: str, one: Talk, setup: Setup, held: Held, on_turn: Callable[[], None]) -> None:
    session_id = (await client.create_session(context_policy=policy)).session_id
    for piece in pieces(one.turns, setup.turn_tokens, setup.measure):
        begun = time.perf_counter()
        await client.generate(messages(piece), session_id=session_id, max_new_tokens=64).read()
        held.turn_s.append(time.perf_counter() - begun)
        held.device_bytes.append((await client.stats()).workers[0].device.bytes)
        on_turn()
    for placed in one.placed:
        question = placed.fact.question
        generation = client.generate(
            [{"role": "user", "content": question.user}], session_id=session_id, max_new_tokens=64
        )
        hit = exact(await generation.read(), question)
        assert generation.receipt is not None
        held.right[int(placed.windows), placed.fact.is_corrected].append(hit)
        held.token_ms.append(generation.receipt.decode_ms / max(1, len(generation.token_ids) - 1))
        on_turn()


def _figures(setup: Setup, held: dict[str, Held]) -> dict[str, Any]:
    figures: dict[str, Any] = {"inside the window": held["error"].accuracy()}
    for policy in ("window", "recall"):
        one = held[policy]
        figures |= {f"{policy}, {windows} windows back": one.accuracy(windows) for windows in setup.windows}
        if any(is_corrected for _, is_corrected in one.right):
            figures[f"{policy}, corrected facts"] = one.accuracy(corrected=True)
        figures[f"{policy}, median turn (s)"] = statistics.median(one.turn_s)
        figures[f"{policy}, last turns to first ones"] = one.growth
        figures[f"{policy}, ms a token"] = statistics.median(one.token_ms)
        figures[f"{policy}, most KV on the device (MiB)"] = max(one.device_bytes) / (1 << 20)
    return figures


def _bars(setup: Setup, held: dict[str, Held]) -> list[Bar]:
    wanted = _SHARE * held["error"].accuracy()
    slower = statistics.median(held["recall"].token_ms) / statistics.median(held["window"].token_ms)
    return [
        *(at_least(f"RECALL, {one} windows back", held["recall"].accuracy(one), wanted) for one in setup.windows),
        at_most("WINDOW", held["window"].accuracy(), _NEAR_ZERO),
        at_most("RECALL: a token, in WINDOW's", slower, _SLOWER),
        at_most("RECALL: the last turns, in the first ones'", held["recall"].growth, _FLAT),
    ]


def _print(setup: Setup, held: dict[str, Held], console: Console) -> None:
    table = Table(title="Exactly right answers", box=SIMPLE_HEAD, padding=0, show_edge=False)
    for head in ("windows back", "WINDOW", "RECALL", "RECALL,\ntold once", "RECALL,\ncorrected"):
        table.add_column(head, justify="right", no_wrap=True)
    for one in setup.windows:
        recall = held["recall"]
        cells = (recall.accuracy(one), recall.accuracy(one, corrected=False), recall.accuracy(one, corrected=True))
        table.add_row(str(one), *(f"{share:.1%}" for share in (held["window"].accuracy(one), *cells)))
    console.print(table)
