"""A whole engine on an accelerator: what offloading costs its decoding, and what resuming from host memory takes."""

import statistics
import time
from collections.abc import Iterator

from transformers import GenerationConfig

from benchmarks.gpu_parts import Line, Setup, TimeUp
from benchmarks.overhead import prompt, serve
from worker.config import WorkerConfig
from worker.engine.build_engine import build_engine
from worker.engine.engine import Engine
from worker.figures import EngineStats
from worker.model.presets import preset_config, random_model

_TENANT = "benchmark"


def offload(setup: Setup, time_up: TimeUp) -> Iterator[Line]:
    """Tokens a second of unrelated prompts, with a host tier that takes every block and with no tier at all."""
    plain = _engine(setup, _pool_bytes(setup), host_bytes=0)
    tiered = _engine(setup, _pool_bytes(setup), host_bytes=4 * _pool_bytes(setup))
    ratios: list[float] = []
    try:
        for number in range(setup.rounds + 1):
            bare, offloading = (_tokens_per_s(setup, engine, number) for engine in (plain, tiered))
            if number:  # the first round is not counted
                ratios.append(bare / offloading)
                stats = tiered.stats()
                yield {
                    "plain_tokens_s": bare,
                    "offloading_tokens_s": offloading,
                    "offloaded_bytes": _moved(stats, "device", "host")[0],
                    "dropped": stats.stores_dropped,
                }
            if number and time_up():
                break
    finally:
        plain.close()
        tiered.close()
    yield {"slowdown": statistics.median(ratios), "rounds": len(ratios)}


def resume(setup: Setup, time_up: TimeUp) -> Iterator[Line]:
    """Bytes a second through all the layers: a history is parked, then restored from the host tier, again and again."""
    history_bytes = setup.resumed_tokens * _token_bytes(setup)
    engine = _engine(setup, 2 * history_bytes, host_bytes=2 * history_bytes, store="memory://")
    try:
        history = prompt(0, setup.resumed_tokens, engine.vocab_size)
        serve(engine, [history], 1)
        for _ in range(setup.rounds):
            engine.park(_TENANT, history, drop_host=False, ttl_s=0).result(60)
            before = _moved(engine.stats(), "host", "device")[0]
            began = time.perf_counter()
            report = engine.warm(_TENANT, history).result(60)
            took_s = time.perf_counter() - began
            num_bytes = _moved(engine.stats(), "host", "device")[0] - before
            yield {"direction": "restore", "gb_s": num_bytes / took_s / 1e9, "tokens": report.restored_tokens}
            if time_up():
                break
        num_bytes, busy_s = _moved(engine.stats(), "device", "host")
        yield {"direction": "offload", "gb_s": num_bytes / busy_s / 1e9, "bytes": num_bytes}
    finally:
        engine.close()


def batching(setup: Setup, time_up: TimeUp) -> Iterator[Line]:
    """Tokens a second of the same prompts by our engine, then by transformers' continuous batching."""
    engine = _engine(setup, _pool_bytes(setup), host_bytes=0)
    try:
        vocab_size = engine.vocab_size
        for number in range(setup.rounds):
            yield {"side": "rekindle", "tokens_s": _tokens_per_s(setup, engine, number)}
    finally:
        engine.close()
    config = preset_config(setup.engine_preset)
    theirs = random_model(config, config.dtype, seed=0).to(setup.device).eval()
    theirs.set_attn_implementation("sdpa")
    settings = GenerationConfig(max_new_tokens=setup.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    for number in range(setup.rounds):
        if time_up():
            return
        prompts = [list(prompt(n, setup.prompt_tokens, vocab_size)) for n in _numbers(setup, number)]
        began = time.perf_counter()
        replies = theirs.generate_batch(prompts, generation_config=settings, progress_bar=False)
        took_s = time.perf_counter() - began
        generated = sum(len(reply.generated_tokens) for reply in replies.values())
        yield {"side": "transformers", "tokens_s": generated / took_s}


def _tokens_per_s(setup: Setup, engine: Engine, number: int) -> float:
    """Of the `number`-th batch of prompts, which nothing is known of."""
    prompts = [prompt(n, setup.prompt_tokens, engine.vocab_size) for n in _numbers(setup, number)]
    began = time.perf_counter()
    generated = serve(engine, prompts, setup.new_tokens)
    return generated / (time.perf_counter() - began)


def _numbers(setup: Setup, number: int) -> range:
    return range(number * setup.requests, (number + 1) * setup.requests)


def _pool_bytes(setup: Setup) -> int:
    return 4 * setup.requests * (setup.prompt_tokens + setup.new_tokens) * _token_bytes(setup)


def _engine(setup: Setup, device_bytes: int, *, host_bytes: int, store: str = "") -> Engine:
    return build_engine(
        WorkerConfig(
            model=f"preset:{setup.engine_preset}",
            device=setup.device.type,
            device_cache_bytes=device_bytes,
            host_cache_bytes=host_bytes,
            redis_url=store,
        )
    )


def _token_bytes(setup: Setup) -> int:
    config = preset_config(setup.engine_preset)
    num_bytes: int = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * config.dtype.itemsize
    return num_bytes


def _moved(stats: EngineStats, source: str, target: str) -> tuple[int, float]:
    """Bytes and busy seconds since the start."""
    moves = [moved for moved in stats.moved if (moved.source, moved.target) == (source, target)]
    return sum(moved.bytes for moved in moves), sum(moved.seconds for moved in moves)
