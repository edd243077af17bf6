"""Where the tokens of a conversation that outgrows the model's window stand, and what they can see. Pure numbers.

After Transformer-XL's segments (Dai et al. 2019) and StreamingLLM's attention sinks (Xiao et al. 2023). A conversation
is cut in epochs. Epoch 0 is its first `reach` tokens, which stand at their own positions and see each other, as in any
conversation. Each later epoch is `epoch_tokens` more. Its tokens stand at the end of the model's positions:

    [0, sinks)             the conversation's first tokens, as they are
    [.., + recall)         pieces of what is older, with keys turned from where they stood to here
    [.., + epoch)          the epoch before, its keys turned back by one epoch
    [.., + epoch)          the epoch itself

So no position exceeds `reach`, a token's keys are turned by at most one epoch, once, and what a token stands at follows
from its number alone. With RECALL the pieces are chosen anew in the course of each turn: see worker/engine/stages.py.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from worker.calls import ContextPolicy
from worker.engine.plan import Span

_VERSION = 3
"""Counts changes of what the KV beyond the window depends on. Some that was stored under the second one is wrong."""
_MIN_SINK_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Epochs:
    """All lengths are in tokens, and multiples of `block_tokens` but for the last three."""

    block_tokens: int
    sink_tokens: int
    recall_tokens: int
    """0: nothing is recalled."""
    epoch_tokens: int
    unit_tokens: int = 1
    """Pieces are of so many tokens; a block has a whole number of them."""
    asking_tokens: int = 1
    """The last tokens of a turn's input that choose what is recalled for themselves and for the reply's beginning."""
    hearing_tokens: int = 1
    """Input before those chooses after each so many tokens of one epoch, for what follows."""
    chosen_by: tuple[float, ...] = ()
    """The numbers by which is chosen: where they are others, what is recalled is, and so is the KV."""

    def __post_init__(self) -> None:
        for tokens in (self.sink_tokens, self.recall_tokens, self.epoch_tokens):
            assert tokens % self.block_tokens == 0, f"{tokens} are no whole blocks of {self.block_tokens}"
        assert self.block_tokens % self.unit_tokens == 0, f"units of {self.unit_tokens} in {self.block_tokens}"
        assert self.recall_tokens <= self.epoch_tokens, "epoch 0 has too little that has left the window"

    @property
    def reach(self) -> int:
        """The model's positions that are used, and the tokens of epoch 0."""
        return self.sink_tokens + self.recall_tokens + 2 * self.epoch_tokens

    @property
    def first_place(self) -> int:
        """Where the first token of a later epoch stands."""
        return self.reach - self.epoch_tokens

    @property
    def num_slots(self) -> int:
        """Units that can be recalled at once."""
        return self.recall_tokens // self.unit_tokens

    def epoch_of(self, position: int) -> int:
        return 0 if position < self.reach else 1 + (position - self.reach) // self.epoch_tokens

    def start_of(self, epoch: int) -> int:
        """The number of an epoch's first token."""
        return 0 if epoch == 0 else self.reach + (epoch - 1) * self.epoch_tokens

    def end_of(self, epoch: int) -> int:
        return self.reach + epoch * self.epoch_tokens

    def shift_of(self, epoch: int) -> int:
        """By how much its tokens stand below their numbers."""
        return epoch * self.epoch_tokens

    def place_of(self, position: int) -> int:
        """Where a token stands for the model."""
        return position - self.shift_of(self.epoch_of(position))

    def carried(self, epoch: int) -> Span:
        """What an epoch sees of the one before."""
        start = self.start_of(epoch)
        return Span(start - self.epoch_tokens, start)

    def gone(self, epoch: int) -> Span:
        """What an epoch can see only where it is recalled."""
        return Span(self.sink_tokens, self.carried(epoch).start)

    def recent(self, epoch: int) -> Span:
        """What is recalled where nothing has been chosen yet: the latest that is gone."""
        gone = self.gone(epoch)
        return Span(gone.end - self.recall_tokens, gone.end)

    def needed(self, num_tokens: int) -> list[Span]:
        """What a turn that goes on behind `num_tokens` tokens needs before it knows more."""
        epoch = self.epoch_of(max(0, num_tokens - 1))
        if epoch == 0:
            return [Span(0, num_tokens)]
        return [Span(0, self.sink_tokens), Span(self.recent(epoch).start, num_tokens)]

    @property
    def digest(self) -> bytes:
        """What makes KV beyond the window interchangeable, beside tokens and turns."""
        lengths = (self.sink_tokens, self.recall_tokens, self.epoch_tokens, self.unit_tokens)
        content = repr((_VERSION, *lengths, self.asking_tokens, self.hearing_tokens, *self.chosen_by))
        return hashlib.blake2b(content.encode(), digest_size=16).digest()


class Turn(NamedTuple):
    """Where a turn's pieces begin, as numbers of tokens."""

    run: int
    """Its computing: with the last token of the turn before, which was never run."""
    asking: int
    """Its asking group, the end of its input: what that asks for, all of it is computed with."""
    reply: int
    """Its reply; the asking group ends here."""


@dataclass(frozen=True)
class Beyond:
    """What becomes of one conversation beyond the window."""

    epochs: Epochs
    bounds: tuple[int, ...] = ()
    """Where its turns begin and where their replies do: start, reply_start, start, reply_start, ..."""

    @property
    def chooses(self) -> bool:
        return self.epochs.recall_tokens > 0

    @property
    def policy(self) -> ContextPolicy:
        return ContextPolicy.RECALL if self.chooses else ContextPolicy.WINDOW

    def salt(self, tokens: Sequence[int], start: int, end: int) -> bytes:
        """What the name of the block of `tokens[start:end]` depends on beside those and all before them.

        Below the window's reach nothing: names are those of any conversation. Beyond it, where KV depends on what was
        chosen, it depends on where turns and their replies begin, and a block of an asking group on all of that group:
        also on what comes behind the block. (That a turn ends or begins right behind a block says nothing of it.)
        """
        epochs = self.epochs
        if start < epochs.reach:
            return b""
        salt = epochs.digest if start == epochs.reach else b""
        if not self.chooses:
            return salt
        marks = []
        for turn in self.turns[self._index(start) :]:
            if turn.run >= end:
                break
            if turn.run >= start:
                marks.append(f"t{turn.run - start}")
            if start < turn.reply <= end or start == epochs.reach >= turn.reply:
                marks.append(f"r{max(0, turn.reply - start)}")
            if turn.asking < end and turn.reply > start:
                assert turn.reply <= len(tokens), "a block's name needs its whole asking group"
                group = np.asarray(tokens[turn.asking : turn.reply], dtype="<u4").tobytes()
                marks.append(f"a{turn.asking - start}:{hashlib.blake2b(group, digest_size=16).hexdigest()}")
        return salt + " ".join(marks).encode()

    @cached_property
    def turns(self) -> Sequence[Turn]:
        starts_and_replies = zip(self.bounds[0::2], self.bounds[1::2], strict=True)
        return [self._turn(max(0, start - 1), reply) for start, reply in starts_and_replies]

    def turn_at(self, position: int) -> Turn:
        """The turn whose computing runs the token at `position`."""
        return self.turns[self._index(position)]

    def _index(self, position: int) -> int:
        return max(0, bisect_right(self.turns, position, key=lambda turn: turn.run) - 1)

    def _turn(self, run: int, reply: int) -> Turn:
        epochs = self.epochs
        asking = max(run, reply - epochs.asking_tokens, epochs.start_of(epochs.epoch_of(max(0, reply - 1))))
        return Turn(run, asking, reply)


def window_epochs(context_tokens: int, block_tokens: int) -> Epochs | None:
    """Sinks and a sliding window in `context_tokens` positions. None where they are too few."""
    return _epochs(context_tokens, block_tokens, 0)


def recall_epochs(
    context_tokens: int,
    block_tokens: int,
    recall_tokens: int,
    *,
    unit: int,
    asking: int,
    hearing: int,
    chosen_by: tuple[float, ...] = (),
) -> Epochs | None:
    """As `window_epochs`, with room for what is recalled. None where the positions are too few for it."""
    recall_tokens = max(1, recall_tokens // block_tokens) * block_tokens
    return _epochs(
        context_tokens,
        block_tokens,
        recall_tokens,
        unit_tokens=min(unit, block_tokens),
        asking_tokens=asking,
        hearing_tokens=hearing,
        chosen_by=chosen_by,
    )


def _epochs(
    context_tokens: int,
    block_tokens: int,
    recall_tokens: int,
    *,
    unit_tokens: int = 1,
    asking_tokens: int = 1,
    hearing_tokens: int = 1,
    chosen_by: tuple[float, ...] = (),
) -> Epochs | None:
    sinks = -(-_MIN_SINK_TOKENS // block_tokens) * block_tokens
    epoch = (context_tokens - sinks - recall_tokens) // (2 * block_tokens) * block_tokens
    if epoch < max(block_tokens, recall_tokens):
        return None
    return Epochs(
        block_tokens=block_tokens,
        sink_tokens=sinks,
        recall_tokens=recall_tokens,
        epoch_tokens=epoch,
        unit_tokens=unit_tokens,
        asking_tokens=asking_tokens,
        hearing_tokens=min(hearing_tokens, epoch),
        chosen_by=chosen_by,
    )
