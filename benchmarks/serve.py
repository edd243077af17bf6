"""What the way through gRPC costs: many streams at once, end to end, against the bare engine."""

import asyncio
import time
from itertools import count

from benchmarks.deployment import deployment
from benchmarks.harness import at_least, finish, interleaved, medians
from benchmarks.overhead import prompt, serve
from cache_store.embedded_redis import RedisServer
from rekindle.client import Client
from worker.config import WorkerConfig
from worker.engine.build_engine import build_engine


def run(
    *,
    preset: str = "qwen3-0.6b",
    streams: int = 32,
    prompt_tokens: int = 32,
    new_tokens: int = 32,
    rounds: int = 3,
    as_json: bool = False,
) -> int:
    """Generate for many prompts at once, through `rekindle serve` and in this process, in turn.

    Args:
        preset: Shape of the model (random weights).
        streams: Requests at once.
        prompt_tokens: Tokens of each prompt, different in every round.
        new_tokens: Tokens generated for each.
        rounds: Counted rounds.
        as_json: Print one JSON object.
    """
    numbers = count()
    model = f"preset:{preset}"

    def prompts(vocab_size: int) -> list[tuple[int, ...]]:
        return [prompt(next(numbers), prompt_tokens, vocab_size) for _ in range(streams)]

    with RedisServer() as redis, deployment(model=model, redis_url=redis.url) as address:
        engine = build_engine(WorkerConfig(model=model, redis_url=redis.url, device_cache_bytes=1 << 30))
        try:

            def through_grpc() -> float:
                work = prompts(engine.vocab_size)
                began = time.perf_counter()
                generated = asyncio.run(_stream_all(address, work, new_tokens))
                return generated / (time.perf_counter() - began)

            def bare() -> float:
                work = prompts(engine.vocab_size)
                began = time.perf_counter()
                return serve(engine, work, new_tokens) / (time.perf_counter() - began)

            sides = {"through_grpc_tokens_per_s": through_grpc, "bare_engine_tokens_per_s": bare}
            figures = interleaved(sides, rounds=rounds, quiet=as_json, title="serve")
        finally:
            engine.close()
    typical = medians(figures)
    ratio = typical["through_grpc_tokens_per_s"] / typical["bare_engine_tokens_per_s"]
    return finish(
        "serve",
        {**typical, "streams": streams, "rounds": figures},
        [at_least(f"share of the bare engine's tokens per second, {streams} streams", ratio, 0.9)],
        as_json=as_json,
    )


async def _stream_all(address: str, prompts: list[tuple[int, ...]], new_tokens: int) -> int:
    async with Client(address) as client:

        async def one(tokens: tuple[int, ...]) -> int:
            generation = client.generate(tokens, max_new_tokens=new_tokens, ignore_eos=True)
            await generation.read()
            return len(generation.token_ids)

        return sum(await asyncio.gather(*map(one, prompts)))
