"""In which pieces a turn is computed beyond the window, and which of them choose what is recalled. Pure.

What a token's KV holds depends on what was recalled when it was computed. So that it follows from the tokens and from
where turns begin alone (else a block's name would lie), each turn chooses by the same rule, whoever computes it and
whenever:

- It begins with the latest of what is gone.
- The last `asking_tokens` of its input are run, and what they asked for is recalled; then they are run again, so that a
  question sees its answer. What was before them in the input has seen the beginning's choice.
- Of the reply, each `every_tokens` tokens have seen what the one before them asked for.

A turn that is computed again (its worker was lost, or blocks of it were) is so from its beginning, piece by piece.
"""

from dataclasses import dataclass

from worker.engine.epochs import Beyond


@dataclass(frozen=True, slots=True)
class Stage:
    """Tokens up to `end`, computed one after the other with the same choice."""

    end: int
    forgets: bool = False
    """A turn begins: what is recalled is the latest of what is gone."""
    chooses: bool = False
    """What is recalled next is chosen by it (by a question's tokens, by a reply's last one)."""
    is_asking: bool = False
    """It is run twice: with the choice before it, and again with its own."""


def next_stage(beyond: Beyond, start: int, num_target: int) -> Stage:
    """What to compute from position `start` on, towards `num_target`: within one epoch, one turn, one choice.

    `start` is where a stage begins.
    """
    epochs = beyond.epochs
    end = min(num_target, epochs.end_of(epochs.epoch_of(start)))
    if not beyond.chooses:
        return Stage(end)
    run_start = beyond.turn_of(start)
    reply_start = _reply_of(beyond, run_start)
    next_run = min((run for run in beyond.runs() if run > run_start), default=num_target)
    forgets = start == max(run_start, epochs.reach)
    if start >= max(reply_start, epochs.reach):
        boundary = group_end(beyond, reply_start, start)
        return Stage(min(end, boundary, next_run), forgets=forgets, chooses=boundary <= min(end, next_run))
    if start < epochs.reach:
        return Stage(min(end, epochs.reach))  # epoch 0 sees all of itself
    last_epoch = epochs.start_of(epochs.epoch_of(reply_start - 1))
    asking = max(run_start, reply_start - epochs.asking_tokens, last_epoch)
    if start < asking:
        return Stage(min(end, asking), forgets=forgets)
    return Stage(min(end, reply_start), forgets=forgets, chooses=True, is_asking=True)


def group_end(beyond: Beyond, reply_start: int, position: int) -> int:
    """Where the part of a reply ends that shares a choice with the token at `position`."""
    every = beyond.epochs.every_tokens
    return reply_start + ((position - reply_start) // every + 1) * every


def _reply_of(beyond: Beyond, run_start: int) -> int:
    """Where the reply of the turn begins whose computing began at `run_start`."""
    return next(reply for run, reply in zip(beyond.runs(), beyond.bounds[1::2], strict=True) if run == run_start)
