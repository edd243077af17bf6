"""In which pieces a turn is computed beyond the window, and which of them choose what is recalled. Pure.

What a token's KV holds depends on what was recalled when it was computed. So that it follows from the tokens and from
where turns begin alone (else a block's name would lie), each turn chooses by the same rule, whoever computes it and
whenever:

- It begins with the latest of what is gone.
- After each `hearing_tokens` of its input, what the last of them asked for most is recalled for the next ones.
- The last `asking_tokens` of its input are run, and what they asked for most is recalled; then they are run again, so
  that a question sees its answer.
- Each token of the reply is run; where it asks for something that is not there, that is recalled in the place of what
  was not asked for longest, and the token is run again: in some models the very token before a fact looks it up.

A turn that is computed again (its worker was lost, or blocks of it were) is so from its beginning, piece by piece.
"""

from dataclasses import dataclass

from worker.engine.epochs import Beyond


@dataclass(frozen=True, slots=True)
class Stage:
    """Tokens up to `end`, computed with the same choice."""

    end: int
    forgets: bool = False
    """A turn begins: what is recalled is the latest of what is gone."""
    asks: bool = False
    """Its queries are heard, and what they ask for is recalled before it is run again."""
    hears: bool = False
    """Of its last tokens the queries are heard, and what they ask for is recalled for those that follow."""
    is_reply: bool = False
    """It is one token of a reply, and is run again only where it asks for something that is not there."""


def next_stage(beyond: Beyond, start: int, num_target: int) -> Stage:
    """What to compute from position `start` on, towards `num_target`: within one epoch, one turn, one choice.

    `start` is where a stage begins.
    """
    epochs = beyond.epochs
    end = min(num_target, epochs.end_of(epochs.epoch_of(start)))
    if not beyond.chooses:
        return Stage(end)
    if start < epochs.reach:
        return Stage(min(end, epochs.reach))  # epoch 0 sees all of itself
    turn = beyond.turn_at(start)
    forgets = start == max(turn.run, epochs.reach)
    if start >= turn.reply:
        return Stage(start + 1, forgets=forgets, asks=True, is_reply=True)
    if start < turn.asking:
        began = max(turn.run, epochs.start_of(epochs.epoch_of(start)))
        heard = start + epochs.hearing_tokens - (start - began) % epochs.hearing_tokens
        return Stage(min(end, turn.asking, heard), forgets=forgets, hears=heard <= min(end, turn.asking))
    return Stage(min(end, turn.reply), forgets=forgets, asks=True)
