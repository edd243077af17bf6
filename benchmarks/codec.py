"""The codecs on KV that models computed: how much smaller, how fast, what is lost, and whether undoing RoPE helps."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from benchmarks.codec_kv import ModelKV, is_checkpoint
from benchmarks.fidelity_figures import RATIOS
from benchmarks.harness import Bar, at_least, finish, interleaved, medians
from cache_store.codecs import LOSSLESS
from worker.tiers.codecs import open_codecs
from worker.tiers.codecs.codec import Codec

_CHATS = 8
"""Over which a checkpoint's loss is averaged."""
_MIN_BLOCK_TOKENS = 64
"""Scales weigh too much in smaller blocks for the lossy codecs' bars."""


def run(
    *,
    models: tuple[str, ...] = ("preset:qwen3-0.6b", "rekindle-recall"),
    num_tokens: int = 512,
    rounds: int = 5,
    as_json: bool = False,
) -> int:
    """Measure every codec on each model's KV of `num_tokens` tokens; GB/s are of raw bytes. Returns 0 if bars hold.

    The ratio is that of blocks after the conversation's first, whose first tokens are kept as they are.
    """
    figures: dict[str, float | int] = {}
    bars: list[Bar] = []
    for model in models:
        of_model, of_bars = _measure(model, num_tokens, rounds, quiet=as_json)
        figures |= {f"{model} {name}": value for name, value in of_model.items()}
        bars += of_bars
    return finish("codec", figures, bars, as_json=as_json)


def _measure(model: str, num_tokens: int, rounds: int, *, quiet: bool) -> tuple[dict[str, float | int], list[Bar]]:
    kv = ModelKV(model, num_tokens)
    loaded = kv.loaded
    codecs = open_codecs(loaded.layout, loaded.rope, loaded.device)
    rotated = open_codecs(loaded.layout, None, loaded.device)
    raw_bytes = len(kv.blocks) * loaded.layout.block_bytes
    payloads = {name: kv.encode(codec) for name, codec in codecs.items()}
    speeds = medians(interleaved(_sides(kv, codecs, payloads, raw_bytes), rounds=rounds, quiet=quiet, title=model))
    chats = [kv, *(ModelKV(model, num_tokens, seed=seed) for seed in range(1, _CHATS if is_checkpoint(model) else 1))]
    figures: dict[str, float | int] = {
        "block tokens": kv.block_tokens,
        "block bytes": loaded.layout.block_bytes,
        "blocks": len(kv.blocks),
    }
    bars = []
    for name, codec in codecs.items():
        ratio, first = _ratio(kv, payloads[name][1:]), _ratio(kv, payloads[name][:1])
        figures |= {f"{name} ratio": ratio, f"{name} ratio of the first block": first}
        figures |= {f"{name} {verb} GB/s": speeds[f"{verb} {name}"] for verb in ("encode", "decode")}
        if codec.info.lossy:
            for how, side in (("", codec), (" with RoPE left in", rotated[name])):
                errors, divergences = zip(*(chat.cost(side) for chat in chats), strict=True)
                figures[f"{name} keys' error{how}"] = statistics.mean(errors)
                figures[f"{name} mean KL{how}"] = statistics.mean(divergences)
        if name in RATIOS and (not codec.info.lossy or kv.block_tokens >= _MIN_BLOCK_TOKENS):
            bars.append(at_least(f"{model} {name} ratio", ratio, RATIOS[name]))
        if codec.info is LOSSLESS:
            # One block after the other, on one thread: coding takes 1/speed, a link is spared 1 - 1/ratio of its time.
            for verb, way in (("encode", "store"), ("decode", "restore")):
                figures[f"lossless speeds a {way} up on links below GB/s"] = speeds[f"{verb} {name}"] * (1 - 1 / ratio)
    return figures, bars


def _sides(
    kv: ModelKV, codecs: Mapping[str, Codec], payloads: Mapping[str, Sequence[bytes]], raw_bytes: int
) -> dict[str, Callable[[], float]]:
    sides: dict[str, Callable[[], float]] = {}
    for name, codec in codecs.items():
        sides[f"encode {name}"] = _gb_per_s(partial(kv.encode, codec), raw_bytes)
        sides[f"decode {name}"] = _gb_per_s(partial(kv.decode, codec, payloads[name]), raw_bytes)
    return sides


def _ratio(kv: ModelKV, payloads: list[bytes]) -> float:
    return len(payloads) * kv.loaded.layout.block_bytes / sum(map(len, payloads))


def _gb_per_s(side: Callable[[], object], num_bytes: int) -> Callable[[], float]:
    def measure() -> float:
        start_s = time.perf_counter()
        side()
        return num_bytes / (time.perf_counter() - start_s) / 1e9

    return measure
