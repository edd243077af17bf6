"""What the cold tiers cost where they can't help: one workload without any reuse, with them and without them."""

import queue
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import count
from multiprocessing import get_context

from benchmarks.harness import at_most, finish, interleaved, medians
from cache_store.embedded_redis import RedisServer
from worker.calls import Event, Failed, Finished, GenerateCall, Sampling
from worker.config import WorkerConfig
from worker.engine.build_engine import build_engine
from worker.engine.engine import Engine
from worker.figures import EngineStats

TENANT = "benchmark"
_REDIS_BYTES = 192 << 20
"""Less than two rounds: Redis is full, as one that has run for a while is, and asks the system for no fresh memory."""


def run(
    *,
    preset: str = "qwen3-0.6b",
    requests: int = 4,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    rounds: int = 9,
    as_json: bool = False,
) -> int:
    """Serve batches of unrelated prompts on two engines in turn, one of them with host tier and Redis.

    Args:
        preset: Shape of the model (random weights).
        requests: Prompts served at once.
        prompt_tokens: Tokens of each prompt, different in every round.
        new_tokens: Tokens generated for each.
        rounds: Counted rounds.
        as_json: Print one JSON object.
    """
    base = {"model": f"preset:{preset}", "device_cache_bytes": 1 << 30}
    with RedisServer(max_memory_bytes=_REDIS_BYTES, eviction_policy="volatile-lru") as redis:
        without = WorkerConfig(**base, host_cache_bytes=0, redis_url="")  # type: ignore[arg-type]
        beside = WorkerConfig(**base, host_cache_bytes=1 << 30, redis_url=redis.url)  # type: ignore[arg-type]
        with own_process(without) as plain, own_process(beside) as tiered:
            numbers = {"without_cold_tiers_s": count(), "with_cold_tiers_s": count()}
            stored_after_s: dict[str, list[float]] = {side: [] for side in numbers}

            def measure(side: str, process: ProcessPoolExecutor) -> float:
                batch = [next(numbers[side]) for _ in range(requests)]
                serving_s, storing_s = process.submit(_timed, batch, prompt_tokens, new_tokens).result()
                stored_after_s[side].append(storing_s)
                return serving_s

            sides = {
                name: partial(measure, name, process) for name, process in zip(numbers, (plain, tiered), strict=True)
            }
            figures = interleaved(sides, rounds=rounds, quiet=as_json, title="overhead")
            stats = tiered.submit(_stats).result()
    typical = medians(figures)
    ratios = [
        tier / bare for tier, bare in zip(figures["with_cold_tiers_s"], figures["without_cold_tiers_s"], strict=True)
    ]
    ratio = sorted(ratios)[len(ratios) // 2]
    measured = {
        **typical,
        "rounds": figures,
        "stored_after_s": stored_after_s["with_cold_tiers_s"],
        "stores_dropped": stats.stores_dropped,
        "host_blocks": stats.host.blocks,
    }
    return finish(
        "overhead",
        measured,
        [at_most("slower with cold tiers, nothing to reuse", ratio, 1.03)],
        as_json=as_json,
    )


@contextmanager
def own_process(config: WorkerConfig) -> Iterator[ProcessPoolExecutor]:
    """A process with one engine, as a worker has: two engines' kernel threads in one process throttle each other."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_start, initargs=(config,)) as process:
        try:
            yield process
        finally:
            process.submit(_close).result()


_engines: list[Engine] = []
"""In a process of its own: the one that it has."""


def _start(config: WorkerConfig) -> None:
    _engines.append(build_engine(config))


def _timed(numbers: Sequence[int], prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Seconds to serve the prompts of these numbers at once, and then until none waits to be stored."""
    (engine,) = _engines
    prompts = [prompt(number, prompt_tokens, engine.vocab_size) for number in numbers]
    began = time.perf_counter()
    serve(engine, prompts, new_tokens)
    served = time.perf_counter()
    for tokens in prompts:
        engine.flush(TENANT, tokens).result()
    return served - began, time.perf_counter() - served


def _stats() -> EngineStats:
    return _engines[0].stats()


def _close() -> None:
    _engines.pop().close()


def prompt(number: int, num_tokens: int, vocab_size: int) -> tuple[int, ...]:
    """Tokens that no other number's prompt begins with."""
    return tuple(
        (number * 7919 + position * 31 + position // 7 * number) % vocab_size for position in range(num_tokens)
    )


def serve(engine: Engine, prompts: list[tuple[int, ...]], new_tokens: int) -> int:
    """Generate for all prompts at once; return the number of tokens generated."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    for number, tokens in enumerate(prompts):
        call = GenerateCall(
            request_id=f"{number}",
            tenant=TENANT,
            history=(),
            input=tokens,
            sampling=Sampling(),
            max_new_tokens=new_tokens,
        )
        engine.submit(call, events.put)
    generated, left = 0, len(prompts)
    while left:
        event = events.get()
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished):
            generated += event.completion_tokens
            left -= 1
    return generated
