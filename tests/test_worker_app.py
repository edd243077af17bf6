"""A whole worker, with a real engine: as a process, and as the actor that Ray will run."""

import asyncio
import io
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import structlog

from protos import rekindle_pb2 as pb
from protos import rekindle_worker_pb2 as wpb
from protos.rekindle_worker_pb2_grpc import WorkerStub
from server.ray_cluster import RayCluster
from tests.test_worker_service import asking, hear, scrape
from worker.actor import WorkerActor
from worker.config import WorkerConfig
from worker.logs import set_up_logs

SMALL = {
    "redis_url": "memory://",
    "block_tokens": 16,
    "device_cache_bytes": 32 << 20,
    "host_cache_bytes": 32 << 20,
    "self_measure_s": 0,
}


@asynccontextmanager
async def started(*arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, dict[str, str]]]:
    """A Python process that serves as a worker, and the addresses that it says; dead at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        yield process, json.loads(await process.stdout.readline())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_worker_process_serves_counts_and_stops_cleanly_on_sigterm() -> None:
    arguments = ("-m", "worker", "--worker-id", "w-9", "--config", json.dumps(SMALL))
    async with started(*arguments) as (process, addresses):
        async with grpc.aio.insecure_channel(addresses["address"]) as channel:
            stub: Any = WorkerStub(channel)  # type: ignore[no-untyped-call]
            first = await hear(stub, asking("hello " * 20, max_new_tokens=20, ignore_eos=True))
            again = await hear(stub, asking("hello " * 20, max_new_tokens=20, ignore_eos=True))
            description = await stub.Describe(wpb.DescribeRequest())
        found = await asyncio.to_thread(scrape, addresses["metrics_address"])
        process.send_signal(signal.SIGTERM)
        _, errors = await asyncio.wait_for(process.communicate(), timeout=30)
    assert process.returncode == 0, errors.decode()
    assert (description.worker_id, description.metrics_address) == ("w-9", addresses["metrics_address"])
    assert len(first.token_ids) == 20
    assert (again.token_ids, again.text) == (first.token_ids, first.text)
    assert again.finished.receipt.device_tokens > 0
    prompts = first.finished.usage.prompt_tokens + again.finished.usage.prompt_tokens
    sources = ("device", "host", "redis", "computed")
    assert sum(found[f'rekindle_prompt_tokens_total{{source="{source}"}}'] for source in sources) == prompts
    assert found['rekindle_ttft_seconds_count{kind="new"}'] == found['rekindle_ttft_seconds_count{kind="hot"}'] == 1


_BREAKS = """
import sys
from worker.__main__ import main
from worker.model.runner import ModelRunner

def run(self, chunks):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

ModelRunner.run = run
sys.argv = ["worker", "--worker-id", "w-9", "--config", sys.argv[1]]
main()
"""


async def test_a_worker_whose_accelerator_is_lost_takes_no_turns_and_ends() -> None:
    async with started("-c", _BREAKS, json.dumps(SMALL)) as (process, addresses):
        async with grpc.aio.insecure_channel(addresses["address"]) as channel:
            stub: Any = WorkerStub(channel)  # type: ignore[no-untyped-call]
            assert (await stub.Describe(wpb.DescribeRequest())).accepting
            for _ in range(3):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await hear(stub, asking("hello"))
                assert caught.value.code() == grpc.StatusCode.INTERNAL
        _, errors = await asyncio.wait_for(process.communicate(), timeout=30)
    assert process.returncode == 70, errors.decode()
    assert "the engine is broken" in errors.decode()


@pytest.mark.parametrize("config", ["[]", "{", '{"nonsense": 1}', '{"block_tokens": 17}'])
async def test_a_worker_process_refuses_a_config_that_makes_no_sense(config: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "worker", "--config", config, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await process.communicate()
    assert process.returncode == 2
    assert b"--config:" in errors


async def test_an_actor_answers_when_it_serves_and_drains_to_its_end() -> None:
    actor = WorkerActor("w-1", WorkerConfig(**SMALL))  # type: ignore[arg-type]
    address, metrics_address = await actor.address(), await actor.metrics_address()
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = WorkerStub(channel)  # type: ignore[no-untyped-call]
        running = asyncio.create_task(hear(stub, asking(max_new_tokens=100, ignore_eos=True)))
        while not (await stub.GetStats(wpb.GetStatsRequest())).running:
            assert not running.done()
        await asyncio.gather(actor.drain(30.0), actor.drain(30.0))
        heard = await running
        assert (len(heard.token_ids), heard.finished.reason) == (100, pb.FINISH_REASON_LENGTH)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Describe(wpb.DescribeRequest())
    with pytest.raises(OSError, match="refused"):
        await asyncio.to_thread(scrape, metrics_address)


def test_a_workers_log_has_tracebacks_without_what_was_said() -> None:
    output = io.StringIO()
    set_up_logs(output)
    try:
        _fail(prompt=" ".join(("my", "secret")))
    except RuntimeError:
        structlog.get_logger().exception("request failed", request="r-1")
    finally:
        structlog.reset_defaults()
    assert "RuntimeError: boom" in output.getvalue()
    assert "r-1" in output.getvalue()
    assert "my secret" not in output.getvalue()


def _fail(prompt: str) -> None:
    raise RuntimeError("boom" if prompt else "")


async def test_an_actor_that_could_not_start_says_why(tmp_path: Any) -> None:
    actor = WorkerActor("w-1", WorkerConfig(model=str(tmp_path / "nowhere"), redis_url=""))
    with pytest.raises(Exception, match="nowhere"):
        await actor.address()


@pytest.mark.ray
async def test_ray_runs_the_actor_on_its_event_loop() -> None:
    cluster = RayCluster(WorkerActor, {"w-1": ("w-1", WorkerConfig(**SMALL))})  # type: ignore[arg-type]
    try:
        await cluster.start()
        await cluster.wait_until_up()
        host, _, port = (await cluster.addresses())["w-1"].partition(":")
        assert (host, int(port) > 0) == ("127.0.0.1", True)
        await cluster.stop_workers(drain_s=5.0)
    finally:
        await cluster.close()
