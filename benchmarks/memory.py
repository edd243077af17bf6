"""How well what was said is found again, by words, by meaning, and as banks do it: `rekindle eval memory`."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.harness import finish
from benchmarks.memory_sets import Conversation, Question, generated, locomo
from cache_store.bank_store import Changes, Seen
from cache_store.banks import BankRecord, BankSettings, Entry, EntryFilter, EntryKind, Kept, Use, Vector
from cache_store.errors import ServingError
from server.banks.index import BankIndex, Found
from server.banks.scoring import best_first
from worker.model.embedder import Embedder
from worker.model.embedder_files import read_embedder

Embed = Callable[[Sequence[str], bool], list[Vector]]
"""Vectors of texts, or of questions."""

_DEPTHS: Final = (1, 5, 10)
_WANTED: Final = max(_DEPTHS)
_MOST: Final = 100
"""Of each ranking."""
_RECALLED: Final = 5
"""Of each question, as many of the best are stronger from then on."""
_ADVERSARIAL: Final = "adversarial"
"""Questions that have no answer: their evidence only looks like one. They have a row, and no part in the total."""
_BATCH: Final = 64


@dataclass(slots=True)
class Figures:
    """Sums over questions."""

    questions: int = 0
    recall: tuple[float, ...] = (0.0,) * len(_DEPTHS)
    reciprocal_rank: float = 0.0

    def add(self, ranking: Sequence[str], evidence: frozenset[str]) -> None:
        self.questions += 1
        shares = [len(evidence.intersection(ranking[:depth])) / len(evidence) for depth in _DEPTHS]
        self.recall = tuple(before + share for before, share in zip(self.recall, shares, strict=True))
        first = next((rank for rank, name in enumerate(ranking, start=1) if name in evidence), None)
        self.reciprocal_rank += 1 / first if first is not None else 0.0

    def means(self) -> dict[str, float]:
        count = max(1, self.questions)
        recall = {f"recall@{depth}": total / count for depth, total in zip(_DEPTHS, self.recall, strict=True)}
        return recall | {"mrr": self.reciprocal_rank / count, "questions": self.questions}


def evaluate(
    *,
    locomo_json: Path | None = None,
    conversations: int = 8,
    max_tokens: int = 6000,
    embedder: str = "",
    seed: int = 0,
    as_json: bool = False,
) -> int:
    """Put what was said into banks, turn by turn, ask each question when it was asked, and look where its evidence is.

    Side by side: BM25, the vectors, both fused, fused with recency and strength, all of it as banks do it by default,
    with diversity, and the same where whoever remembers says what is corrected (LoCoMo says nothing of that). Recall
    at k is the share of a question's evidence among the first k, MRR the mean of one by the rank of the first that is
    evidence. There are no bars: sets and embedders differ.

    Args:
        locomo_json: LoCoMo's file (locomo10.json). Without it the set is a generated one.
        conversations: To generate.
        max_tokens: Length of each, about.
        embedder: As of workers: a directory or a hub id; empty is the default one.
        seed: Of the conversations.
        as_json: Print one JSON object.
    """
    try:
        sets = locomo(locomo_json) if locomo_json else generated(conversations, seed=seed, max_tokens=max_tokens)
        files = read_embedder(embedder)
        if files is None or not any(one.questions for one in sets):
            raise SystemExit("rekindle: there is no embedder, or no question with evidence")
        embed = _embed_by(Embedder(files, torch.device("cpu")))
        figures = measure(sets, embed, quiet=as_json)
    except (ServingError, OSError) as error:
        raise SystemExit(f"rekindle: {error}") from error
    means = {arm: {kind: one.means() for kind, one in kinds.items()} for arm, kinds in figures.items()}
    about: dict[str, Any] = {"set": locomo_json.name if locomo_json else f"generated, seed {seed}"}
    about |= {"conversations": len(sets), "entries": sum(len(one.said) for one in sets)}
    if as_json:
        return finish("memory", about | {"arms": means}, [], as_json=True)
    _print(means, Console())
    return finish("memory", about, [], as_json=False)


def measure(sets: Sequence[Conversation], embed: Embed, *, quiet: bool) -> dict[str, dict[str, Figures]]:
    """Figures by arm and by kind of question; `total` is all of them but the adversarial."""
    figures: dict[str, dict[str, Figures]] = defaultdict(lambda: defaultdict(Figures))
    with Progress(console=Console(stderr=True), disable=quiet, transient=True) as progress:
        task = progress.add_task("asking", total=sum(len(one.questions) for one in sets))
        for conversation in sets:
            for question, rankings in _asked(conversation, embed):
                for arm, ranking in rankings.items():
                    figures[arm][question.category].add(ranking, question.evidence)
                    if question.category != _ADVERSARIAL:
                        figures[arm]["total"].add(ranking, question.evidence)
                progress.advance(task)
    return figures


def _asked(conversation: Conversation, embed: Embed) -> Iterable[tuple[Question, dict[str, list[str]]]]:
    """Each question with what the arms find, the best first."""
    vectors = embed([one.text for one in conversation.said], False)
    asked = embed([one.text for one in conversation.questions], True)
    index, known = BankIndex(), 0
    served, plain = (_bank(len(vectors[0]), one) for one in (BankSettings(), BankSettings(diversity=1.0)))
    index.apply(Changes(served, Seen(), True, [], [], True))
    uses: dict[str, Use] = {}
    for question, vector in zip(conversation.questions, asked, strict=True):
        index.apply(Changes(served, Seen(), False, _told(conversation, vectors, known, question.num_said), [], True))
        known = max(known, question.num_said)
        found = index.search(question.text, vector, EntryFilter(), k=_WANTED, with_superseded=True)
        rankings = {
            "BM25": _ordered(found, np.where(found.bm25 > 0, found.bm25, -np.inf)),
            "dense": _ordered(found, found.cosine),
            "fused": _ordered(found, found.relevance),
        }
        standing = index.search(question.text, vector, EntryFilter(), k=_WANTED, with_superseded=False)
        for arm, bank, candidates in (
            ("fused, recency, strength", plain, found),
            ("as served", served, found),
            ("as served, corrected", served, standing),
        ):
            of_found = [uses.get(name, Use(0, 0)) for name in candidates.ids]
            ranked = index.ranked(bank, candidates, of_found, k=_MOST, now_ms=question.at_ms)
            rankings[arm] = [one.id for one in ranked]
        yield question, rankings
        for name in rankings["as served"][:_RECALLED]:
            uses[name] = Use(uses.get(name, Use(0, 0)).recalls + 1, question.at_ms)


def _ordered(found: Found, values: np.ndarray[tuple[int], np.dtype[np.floating]]) -> list[str]:
    return [found.ids[place] for place in best_first(values, _MOST)]


def _told(conversation: Conversation, vectors: Sequence[Vector], first: int, end: int) -> list[Kept]:
    """What is said from `first` on, and what that corrects, in the state that it is in then."""
    winners = {said.corrects: said.name for said in conversation.said[:end] if said.corrects}
    news = {said.name for said in conversation.said[first:end]}
    return [
        Kept(
            Entry(
                id=said.name,
                text=said.text,
                kind=EntryKind.EPISODE,
                created_ms=said.at_ms,
                superseded_by=winners.get(said.name, ""),
            ),
            vectors[place],
        )
        for place, said in enumerate(conversation.said[:end])
        if said.name in news or winners.get(said.name) in news
    ]


def _bank(dim: int, settings: BankSettings) -> BankRecord:
    return BankRecord(
        tenant="",
        name="",
        description="",
        created_ms=0,
        settings=settings,
        embedding_dim=dim,
    )


def _embed_by(model: Embedder) -> Embed:
    def embed(texts: Sequence[str], is_query: bool) -> list[Vector]:
        passages = [model.passages(text, chunk_tokens=0, overlap_tokens=0, is_query=is_query)[0] for text in texts]
        vectors: list[Vector] = []
        for start in range(0, len(passages), _BATCH):
            vectors += list(model.vectors(passages[start : start + _BATCH]))
        return vectors

    return embed


def _print(means: Mapping[str, Mapping[str, Mapping[str, float]]], console: Console) -> None:
    figures = [*(f"recall@{depth}" for depth in _DEPTHS), "mrr"]
    table = Table("questions", "found by", *figures, box=SIMPLE_HEAD, title="where the evidence is found")
    kinds = {kind for by_kind in means.values() for kind in by_kind}
    for kind in sorted(kinds, key=lambda kind: (kind == "total", kind)):
        for arm, by_kind in means.items():
            heading = f"{kind} ({by_kind[kind]['questions']:.0f})" if arm == next(iter(means)) else ""
            table.add_row(heading, arm, *(f"{by_kind[kind][figure]:.3f}" for figure in figures))
        table.add_section()
    console.print(table)
