"""Decoding: our runner over the block pool against transformers with its DynamicCache, at the same dtype."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel

from benchmarks.bare_models import Ours, Theirs, load_both
from benchmarks.harness import Bar, at_least, finish, interleaved, medians
from worker.model.load import LoadedModel

_WANTED_AT_1024 = {1: 1.2, 8: 2.0, 32: 3.0}
"""Times faster than transformers, by batch."""
_WANTED_UNEQUAL = 0.95
"""Share of the speed of equally long sequences: padded ones would give half."""


def run(
    *,
    preset: str = "qwen3-0.6b",
    contexts: Sequence[int] = (256, 1024),
    batches: Sequence[int] = (1, 8, 32),
    steps: int = 8,
    rounds: int = 3,
    as_json: bool = False,
) -> int:
    """Measure tokens per second of greedy decoding: sequences equally long, and unequally long ones of as many tokens.

    Args:
        preset: Shape of the model (random weights).
        contexts: Tokens that each sequence holds at first.
        batches: Sequences decoding at once.
        steps: Tokens decoded per sequence and round.
        rounds: Counted rounds of each side.
        as_json: Print one JSON object.
    """
    loaded, model = load_both(preset)
    figures: dict[str, Any] = {"preset": preset, "dtype": loaded.layout.dtype, "unit": "tokens/s"}
    bars: list[Bar] = []
    for context in contexts:
        for batch in batches:
            sides = _sides(loaded, model, context, batch, steps)
            name = f"context {context} batch {batch}"
            measured = interleaved(sides, rounds=rounds, quiet=as_json, title=name)
            typical = medians(measured)
            figures |= {f"{name} {side}": speed for side, speed in typical.items()}
            figures |= {f"{name} {side} rounds": speeds for side, speeds in measured.items()}
            if context == 1024 and batch in _WANTED_AT_1024:
                ratio = typical["rekindle"] / typical["transformers"]
                bars.append(at_least(f"decode {name}: times transformers", ratio, _WANTED_AT_1024[batch]))
                if batch > 1:
                    share = typical["unequal lengths"] / typical["rekindle"]
                    bars.append(at_least(f"decode {name}: unequal lengths against equal", share, _WANTED_UNEQUAL))
            del sides  # before the next ones take as much memory
    return finish("decode", figures, bars, as_json=as_json)


def _sides(
    loaded: LoadedModel, model: PreTrainedModel, context: int, batch: int, steps: int
) -> dict[str, Callable[[], float]]:
    """Each side's tokens per second."""
    ours, theirs = Ours(loaded, batch, context + steps), Theirs(model, batch)
    sides = {
        "rekindle": lambda: batch * steps / ours.decode(context, steps),
        "transformers": lambda: batch * steps / theirs.decode(context, steps),
    }
    if batch > 1:
        lengths = unequal_lengths(context, batch)
        sides["unequal lengths"] = lambda: batch * steps / ours.decode(lengths, steps)
    return sides


def unequal_lengths(mean: int, batch: int) -> list[int]:
    """In even steps up to nearly twice the mean, which they have."""
    return [mean * (2 * number + 1) // batch for number in range(batch)]
