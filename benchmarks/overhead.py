"""What the cold tiers cost where they can't help: one workload without any reuse, with them and without them."""

import queue
import time
from itertools import count

from benchmarks.harness import at_most, finish, interleaved, medians
from cache_store.embedded_redis import RedisServer
from worker.calls import Event, Failed, Finished, GenerateCall, Sampling
from worker.config import WorkerConfig
from worker.engine.build_engine import build_engine
from worker.engine.engine import Engine


def run(
    *,
    preset: str = "qwen3-0.6b",
    requests: int = 4,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    rounds: int = 5,
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
    numbers = count()

    def measure(engine: Engine) -> float:
        began = time.perf_counter()
        serve(engine, [prompt(next(numbers), prompt_tokens, engine.vocab_size) for _ in range(requests)], new_tokens)
        return time.perf_counter() - began

    with RedisServer() as redis:
        base = {"model": f"preset:{preset}", "device_cache_bytes": 1 << 30}
        plain = build_engine(WorkerConfig(**base, host_cache_bytes=0, redis_url=""))  # type: ignore[arg-type]
        tiered = build_engine(WorkerConfig(**base, host_cache_bytes=1 << 30, redis_url=redis.url))  # type: ignore[arg-type]
        try:
            sides = {"without_cold_tiers_s": lambda: measure(plain), "with_cold_tiers_s": lambda: measure(tiered)}
            figures = interleaved(sides, rounds=rounds, quiet=as_json, title="overhead")
            stats = tiered.stats()
        finally:
            plain.close()
            tiered.close()
    typical = medians(figures)
    ratios = [
        tier / bare for tier, bare in zip(figures["with_cold_tiers_s"], figures["without_cold_tiers_s"], strict=True)
    ]
    ratio = sorted(ratios)[len(ratios) // 2]
    return finish(
        "overhead",
        {**typical, "rounds": figures, "stores_dropped": stats.stores_dropped, "host_blocks": stats.host.blocks},
        [at_most("slower with cold tiers, nothing to reuse", ratio, 1.03)],
        as_json=as_json,
    )


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
            tenant="benchmark",
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
