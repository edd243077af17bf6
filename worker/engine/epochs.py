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
from collections.abc import Sequence
from dataclasses import dataclass

from worker.calls import ContextPolicy
from worker.engine.plan import Span

_VERSION = 1
"""Counts changes of what the KV beyond the window depends on."""
_MIN_SINK_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Epochs:
    """All lengths are in tokens, and multiples of `block_tokens` but for the last two."""

    block_tokens: int
    sink_tokens: int
    recall_tokens: int
    """0: nothing is recalled."""
    epoch_tokens: int
    unit_tokens: int = 1
    """Pieces are of so many tokens; a block has a whole number of them."""
    asking_tokens: int = 1
    """The last tokens of a turn's input that choose what is recalled for themselves and for the reply's beginning."""

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
        numbers = (_VERSION, self.sink_tokens, self.recall_tokens, self.epoch_tokens)
        return hashlib.blake2b(repr((*numbers, self.unit_tokens, self.asking_tokens)).encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
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

    def salt(self, start: int, num_tokens: int) -> bytes:
        """What the name of the block of tokens [start, start + num_tokens) depends on beside all tokens up to there.

        Below the window's reach nothing: names are those of any conversation. Where KV depends on what was chosen, it
        depends on where turns begin and end. (That a turn ends, or begins, right behind the block says nothing of it;
        that its input does, does.)
        """
        if start < self.epochs.reach:
            return b""
        salt = self.epochs.digest if start == self.epochs.reach else b""
        if self.chooses:
            starts, replies = self.runs(), self.bounds[1::2]
            inside = [f"t{at - start}" for at in starts if start <= at < start + num_tokens]
            inside += [f"r{at - start}" for at in replies if start < at <= start + num_tokens]
            salt += " ".join(inside).encode()
        return salt

    def runs(self) -> Sequence[int]:
        """Where the computing of each turn begins: with the last token of the one before, which was never run."""
        return [max(0, start - 1) for start in self.bounds[0::2]]

    def turn_of(self, position: int) -> int:
        """Where the computing of the turn began that runs the token at `position`."""
        return max((start for start in self.runs() if start <= position), default=0)


def window_epochs(context_tokens: int, block_tokens: int) -> Epochs | None:
    """Sinks and a sliding window in `context_tokens` positions. None where they are too few."""
    return _epochs(context_tokens, block_tokens, 0)


def recall_epochs(
    context_tokens: int, block_tokens: int, recall_tokens: int, *, unit: int, asking: int
) -> Epochs | None:
    """As `window_epochs`, with room for what is recalled. None where the positions are too few for it."""
    recall_tokens = max(1, recall_tokens // block_tokens) * block_tokens
    return _epochs(
        context_tokens,
        block_tokens,
        recall_tokens,
        unit_tokens=min(unit, block_tokens),
        asking_tokens=asking,
    )


def _epochs(context_tokens: int, block_tokens: int, recall_tokens: int, **choice: int) -> Epochs | None:
    sinks = -(-_MIN_SINK_TOKENS // block_tokens) * block_tokens
    epoch = (context_tokens - sinks - recall_tokens) // (2 * block_tokens) * block_tokens
    if epoch < max(block_tokens, recall_tokens):
        return None
    return Epochs(
        block_tokens=block_tokens,
        sink_tokens=sinks,
        recall_tokens=recall_tokens,
        epoch_tokens=epoch,
        **choice,
    )
