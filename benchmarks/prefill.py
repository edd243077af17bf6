"""Prefill: a prompt in chunks through our runner against one forward of transformers, at the same dtype."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.bare_models import Ours, Theirs, load_both, random_prompt
from benchmarks.harness import Bar, at_least, finish, interleaved, medians
from worker.config import WorkerConfig


def run(
    *,
    preset: str = "qwen3-0.6b",
    lengths: Sequence[int] = (512, 2048),
    rounds: int = 3,
    as_json: bool = False,
) -> int:
    """Measure tokens per second from prompt to the logits of its last token.

    Args:
        preset: Shape of the model (random weights).
        lengths: Tokens of the prompts.
        rounds: Counted rounds of each side.
        as_json: Print one JSON object.
    """
    loaded, model = load_both(preset)
    chunk_tokens = WorkerConfig().max_prefill_tokens
    figures: dict[str, Any] = {
        "preset": preset,
        "dtype": loaded.layout.dtype,
        "unit": "tokens/s",
        "tokens per step": chunk_tokens,
    }
    bars: list[Bar] = []
    for length in lengths:
        prompt = random_prompt(length, loaded.vocab_size, seed=length)
        ours, theirs = Ours(loaded, 1, length), Theirs(model, 1)
        sides = {
            "rekindle": lambda: length / ours.prefill(prompt, chunk_tokens),  # noqa: B023 (called in this turn)
            "transformers": lambda: length / theirs.prefill(prompt),  # noqa: B023
        }
        measured = interleaved(sides, rounds=rounds, quiet=as_json, title=f"prefill {length}")
        figures |= {f"{length} tokens {side}": speed for side, speed in medians(measured).items()}
        figures |= {f"{length} tokens {side} rounds": speeds for side, speeds in measured.items()}
        ratio = statistics.median(
            mine / other for mine, other in zip(measured["rekindle"], measured["transformers"], strict=True)
        )
        bars.append(at_least(f"prefill of {length}: times transformers", ratio, 1.0))
    return finish("prefill", figures, bars, as_json=as_json)
