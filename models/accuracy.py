"""How well a model answers: the share of exactly right replies, by what was asked and how far back the fact lies.

A reply is right when every one of its tokens is the likeliest after those before it, which is when greedy decoding
gives it word for word: one forward pass judges a whole dialogue.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from models.dialogues import Dialogue, Style, Turn, dialogue
from models.encoding import encode, measure

STYLES = {
    "words and phrases of training": Style(),
    "held-out words": Style(held_out_words=True),
    "held-out phrases": Style(held_out_phrases=True),
    "both held out": Style(held_out_words=True, held_out_phrases=True),
}
_NEAREST = 64


@dataclass(frozen=True, slots=True)
class Judged:
    """One reply of a dialogue."""

    turn: Turn
    right: bool
    distance: int | None
    """Of an answer: tokens from where the value was last said to where the answer begins."""


def judge(model: Any, tokenizer: Any, talk: Dialogue) -> list[Judged]:
    """Judge all replies of a dialogue, with the right ones before them as the history."""
    ids, starts, spans = [tokenizer.bos_token_id], [], []
    for turn, prompt, reply in encode(tokenizer, talk):
        starts.append(len(ids))
        ids += prompt
        spans.append((turn, len(ids), len(ids) + len(reply)))
        ids += reply
    tokens = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        best = model(input_ids=tokens).logits[0, :-1].argmax(-1)
    hits = (best == tokens[0, 1:]).tolist()
    return [
        Judged(turn, all(hits[start - 1 : end - 1]), None if turn.said_turn is None else start - starts[turn.said_turn])
        for turn, start, end in spans
    ]


def held_out_dialogues(tokenizer: Any, style: Style, *, num_tokens: int, count: int, seed: str) -> Iterator[Dialogue]:
    """Dialogues that no training has seen, of at most `num_tokens` tokens each and nearly that."""
    for index in range(count):
        yield dialogue(Random(f"judge/{seed}/{index}"), style, num_tokens - 1, lambda turn: measure(tokenizer, turn))


def by_act(judged: Iterable[Judged]) -> dict[str, tuple[float, int]]:
    """Share right and number of replies, by what the user did; and of answers that were corrected before."""
    return _shares(judged, lambda one: [one.turn.act.value] + ["ask_corrected"] * one.turn.corrected)


def by_distance(judged: Iterable[Judged]) -> dict[int, tuple[float, int]]:
    """Share right and number of answers, by distance: up to 64 tokens, then up to each power of two."""
    return _shares(judged, lambda one: [] if one.distance is None else [_up_to(one.distance)])


def _up_to(distance: int) -> int:
    return max(_NEAREST, 1 << (distance - 1).bit_length())


def _shares(judged: Iterable[Judged], groups_of: Callable[[Judged], Sequence[Any]]) -> dict[Any, tuple[float, int]]:
    found: dict[Any, list[bool]] = defaultdict(list)
    for one in judged:
        for group in groups_of(one):
            found[group].append(one.right)
    return {group: (sum(rights) / len(rights), len(rights)) for group, rights in sorted(found.items())}
