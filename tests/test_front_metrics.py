"""What the front end's Prometheus endpoint shows after real turns."""

import asyncio
import urllib.request

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from protos import rekindle_pb2 as pb
from tests.fake_worker import FrontEnd, front_end
from worker.errors import Draining


async def scrape(front: FrontEnd) -> dict[str, float]:
    """Every sample by name and labels, as `name{a=b}`."""

    def read() -> str:
        with urllib.request.urlopen(f"http://{front.app.metrics_address}/metrics", timeout=5) as response:
            return str(response.read(), "utf-8")

    samples = {}
    for family in text_string_to_metric_families(await asyncio.to_thread(read)):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}"] = sample.value
    return samples


async def test_prompt_tokens_by_source_add_up_to_the_usage_of_all_turns() -> None:
    async with front_end() as front:
        await front.new_session()
        replies = [await front.turn("one", "s"), await front.turn("two", "s")]
        await front.sessions.ParkSession(pb.ParkSessionRequest(session_id="s"))
        replies += [await front.turn("three", "s"), await front.turn("no session")]
        samples = await scrape(front)
    for source in ("device", "host", "redis", "computed"):
        expected = sum(getattr(reply.finished.receipt, f"{source}_tokens") for reply in replies)
        assert samples[f"rekindle_front_prompt_tokens_total{{source={source}}}"] == expected
    by_source = [value for name, value in samples.items() if name.startswith("rekindle_front_prompt_tokens_total")]
    assert sum(by_source) == sum(reply.finished.usage.prompt_tokens for reply in replies)
    missed = [value for name, value in samples.items() if name.startswith("rekindle_front_miss_tokens_total")]
    assert sum(missed) == samples["rekindle_front_prompt_tokens_total{source=computed}"]
    assert samples["rekindle_front_completion_tokens_total{}"] == 32
    counts = {
        kind: samples.get(f"rekindle_front_ttft_seconds_count{{kind={kind}}}", 0) for kind in ("new", "hot", "redis")
    }
    assert counts == {"new": 2, "hot": 1, "redis": 1}
    assert samples["rekindle_front_tpot_seconds_count{kind=redis}"] == 1


async def test_calls_are_counted_by_code_and_none_is_left_running() -> None:
    async with front_end() as front:
        await front.turn()
        with pytest.raises(grpc.aio.AioRpcError):
            await front.turn("")
        with pytest.raises(grpc.aio.AioRpcError):
            await front.session("unknown")
        for worker in front.workers.values():
            worker.pause_s = 5.0
        call = front.inference.Generate(pb.GenerateRequest(text="x"))
        await asyncio.sleep(0.1)
        during = await scrape(front)
        call.cancel()
        await asyncio.sleep(0.1)
        after = await scrape(front)
    assert during["rekindle_front_requests_in_flight{method=Inference/Generate}"] == 1
    assert after["rekindle_front_requests_in_flight{method=Inference/Generate}"] == 0
    for method, code in (
        ("Inference/Generate", "OK"),
        ("Inference/Generate", "INVALID_ARGUMENT"),
        ("Inference/Generate", "CANCELLED"),
        ("Sessions/GetSession", "NOT_FOUND"),
    ):
        assert after[f"rekindle_front_requests_total{{code={code},method={method}}}"] == 1


async def test_workers_and_retries_are_counted() -> None:
    async with front_end(num_workers=3) as front:
        await front.new_session()
        home = (await front.turn("one", "s")).finished.receipt.worker_id
        front.workers[home].refuse_with = Draining("leaving")
        await front.turn("two", "s")
        front.workers[home].accepting = False
        await front.kill(str((int(home) + 1) % 3))
        await asyncio.sleep(0.5)
        samples = await scrape(front)
    assert samples["rekindle_front_turn_retries_total{}"] == 1
    assert [samples[f"rekindle_front_workers{{state={state}}}"] for state in ("accepting", "draining", "down")] == [
        1,
        1,
        1,
    ]


async def test_two_front_ends_in_one_process_count_apart() -> None:
    async with front_end() as first, front_end() as second:
        await first.turn()
        assert (await scrape(first))["rekindle_front_completion_tokens_total{}"] == 8
        assert (await scrape(second))["rekindle_front_completion_tokens_total{}"] == 0
