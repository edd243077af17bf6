"""What Prometheus reads after real turns: the sums hold, and worker, front end and CacheStats say the same."""

import re
from collections import Counter
from typing import Any

from protos import rekindle_pb2 as pb
from tests.systems import System, Turn, WorkerProcess, eventually, scrape

SOURCES = ("device", "host", "redis", "computed")


def by_source(samples: dict[str, float], name: str) -> Counter[str]:
    return Counter({source: int(samples[f"{name}{{source={source}}}"]) for source in SOURCES})


def of_message(tokens: Any) -> Counter[str]:
    return Counter({source: getattr(tokens, source) for source in SOURCES})


def of_receipts(turns: list[Turn]) -> Counter[str]:
    return Counter({source: sum(getattr(turn.receipt, f"{source}_tokens") for turn in turns) for source in SOURCES})


async def turns_of_every_kind(system: System) -> list[Turn]:
    """New, hot, from the host tier, from Redis, and one without a session."""
    session_id = (await system.client.create_session()).session_id
    turns = [await system.say("Count what this costs, token by token", session_id) for _ in range(2)]
    await system.client.park_session(session_id)
    turns.append(await system.say("And what the host tier saves", session_id))
    await system.client.park_session(session_id, drop_host=True)
    turns.append(await system.say("And what Redis saves", session_id))
    turns.append(await system.say("And what nobody keeps"))
    return turns


async def test_tokens_by_source_add_up_and_agree_everywhere(
    system: System, workers: tuple[WorkerProcess, WorkerProcess]
) -> None:
    before = [await scrape(worker.metrics_address) for worker in workers]
    turns = await turns_of_every_kind(system)
    after = [await scrape(worker.metrics_address) for worker in workers]
    front = await scrape(system.application.metrics_address)
    expected = of_receipts(turns)
    assert min(expected.values()) > 0
    assert expected.total() == sum(turn.finished.usage.prompt_tokens for turn in turns)
    assert by_source(front, "rekindle_front_prompt_tokens_total") == expected
    name = "rekindle_prompt_tokens_total"
    rise: Counter[str] = sum(
        (by_source(late, name) - by_source(early, name) for early, late in zip(before, after, strict=True)), Counter()
    )
    assert rise == expected

    misses = {key: value for key, value in front.items() if key.startswith("rekindle_front_miss_tokens_total{")}
    assert sum(misses.values()) == expected["computed"]
    completion_tokens = sum(turn.finished.usage.completion_tokens for turn in turns)
    assert front["rekindle_front_completion_tokens_total"] == completion_tokens
    assert front["rekindle_front_requests_total{code=OK,method=Inference/Generate}"] == len(turns)
    for kind, number in (("new", 2), ("hot", 1), ("host", 1), ("redis", 1)):
        assert front[f"rekindle_front_ttft_seconds_count{{kind={kind}}}"] == number
        assert front[f"rekindle_front_tpot_seconds_count{{kind={kind}}}"] == number
    everything = [*front, *after[0], *after[1]]
    assert [name for name in everything if not re.match(r"rekindle_\w+", name)] == []


async def test_cache_stats_say_what_the_workers_say_and_rates_are_ratios(
    system: System, workers: tuple[WorkerProcess, WorkerProcess]
) -> None:
    await turns_of_every_kind(system)
    await eventually(system.is_idle)
    stats = await system.client.stats()
    assert [worker.worker_id for worker in stats.workers] == ["0", "1"]
    total = of_message(stats.prompt_tokens)
    assert total == sum((of_message(worker.prompt_tokens) for worker in stats.workers), Counter())
    for worker, process in zip(stats.workers, workers, strict=True):
        samples = await scrape(process.metrics_address)
        assert of_message(worker.prompt_tokens) == by_source(samples, "rekindle_prompt_tokens_total")
        assert worker.device.bytes == samples["rekindle_cache_bytes{tier=device}"]
        assert worker.host.blocks == samples["rekindle_host_blocks{state=held}"]
        assert worker.device.capacity_blocks == sum(
            value for name, value in samples.items() if name.startswith("rekindle_device_blocks{")
        )
    assert stats.hit_rate == (total["device"] + total["host"] + total["redis"]) / total.total()
    for source, rate in (
        ("device", stats.device_hit_rate),
        ("host", stats.host_hit_rate),
        ("redis", stats.redis_hit_rate),
    ):
        assert rate == total[source] / total.total()
    assert stats.redis.available
    assert stats.redis.used_bytes > 0


async def test_moves_between_tiers_are_counted_in_bytes_and_seconds(
    system: System, workers: tuple[WorkerProcess, WorkerProcess]
) -> None:
    turns = await turns_of_every_kind(system)
    from_redis = next(turn.receipt for turn in turns if turn.receipt.redis_tokens)
    worker = next(worker for worker in workers if worker.worker_id == from_redis.worker_id)
    samples = await scrape(worker.metrics_address)
    moves = [
        f"codec=raw,source={way[0]},target={way[1]}"
        for way in (("device", "host"), ("host", "redis"), ("host", "device"))
    ]
    assert all(samples[f"rekindle_moved_bytes_total{{{move}}}"] > 0 for move in moves)
    assert all(samples[f"rekindle_moved_seconds_total{{{move}}}"] > 0 for move in moves)
    restored = sum(
        value for name, value in samples.items() if re.match(r"rekindle_moved_bytes_total.*target=device", name)
    )
    assert restored >= from_redis.restored_bytes > 0
    assert samples["rekindle_prefill_saved_seconds_total"] > 0


async def test_gauges_of_work_go_back_to_nothing(system: System, workers: tuple[WorkerProcess, WorkerProcess]) -> None:
    async with system.client.generate("Is anybody counting?", max_new_tokens=2000, ignore_eos=True) as generation:
        await anext(aiter(generation))
        front = await scrape(system.application.metrics_address)
        assert front["rekindle_front_requests_in_flight{method=Inference/Generate}"] == 1
        running = [
            (await scrape(worker.metrics_address))["rekindle_queue_requests{state=running}"] for worker in workers
        ]
        assert sum(running) == 1
        assert front["rekindle_front_workers{state=accepting}"] == 2

    async def nothing_runs() -> bool:
        front = await scrape(system.application.metrics_address)
        return front["rekindle_front_requests_in_flight{method=Inference/Generate}"] == 0

    async def nothing_is_used() -> bool:
        samples = [await scrape(worker.metrics_address) for worker in workers]
        return not any(
            sample["rekindle_queue_requests{state=running}"] + sample["rekindle_device_blocks{state=used}"]
            for sample in samples
        )

    await eventually(nothing_runs, within_s=1.0)
    await eventually(nothing_is_used, within_s=2.0)


async def test_calls_that_fail_are_counted_by_code(system: System) -> None:
    session_id = (await system.client.create_session()).session_id
    await system.client.get_session(session_id)
    for bad in (pb.GenerateRequest(), pb.GenerateRequest(text="x", session_id="unknown")):
        response = system.inference.Generate(bad)
        assert (await response.code()).name in ("INVALID_ARGUMENT", "NOT_FOUND")
    front = await scrape(system.application.metrics_address)
    for code in ("INVALID_ARGUMENT", "NOT_FOUND"):
        assert front[f"rekindle_front_requests_total{{code={code},method=Inference/Generate}}"] == 1
    assert front["rekindle_front_requests_total{code=OK,method=Sessions/GetSession}"] == 1
