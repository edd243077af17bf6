"""One front end with very many conversations: those that idle cost it nothing, those that stream do not starve."""

import asyncio
import gc
import os
import time
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc import StatusCode

from protos import rekindle_pb2 as pb
from tests.fake_worker import FrontEnd, details_of, front_end
from tests.systems import eventually

_IDLE = 10_000
_STREAMS = 1_000
_TOKENS = 5
_PAUSE_S = 1.5
"""Before each token."""
_CONNECTIONS = 64
"""To Redis, at the most."""


def resident_bytes() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def create_sessions(front: FrontEnd, first: int, count: int, *, at_once: int = 50) -> None:
    for start in range(first, first + count, at_once):
        await asyncio.gather(*(front.new_session(f"s-{n}") for n in range(start, min(start + at_once, first + count))))


@pytest.mark.slow
async def test_ten_thousand_idle_sessions_cost_a_front_end_neither_memory_nor_files(redis_url: str) -> None:
    async with front_end(redis_url=redis_url) as front:
        await create_sessions(front, 0, 1000)  # connections are open, buffers have their size
        memory, files = resident_bytes(), open_files()
        await create_sessions(front, 1000, _IDLE)
        assert (resident_bytes() - memory) / _IDLE < 1000, "bytes a session"
        assert open_files() - files <= _CONNECTIONS
        assert (await front.turn("hi", "s-0")).finished.turn == 1


async def stream(front: FrontEnd, session_id: str) -> list[float]:
    """Run a turn; when its tokens came, in seconds since it was asked for."""
    began_s = time.monotonic()
    request = pb.GenerateRequest(session_id=session_id, text="hi", sampling=pb.Sampling(max_new_tokens=_TOKENS))
    responses = front.inference.Generate(request, timeout=60)
    return [time.monotonic() - began_s async for response in responses if response.HasField("delta")]


@pytest.mark.slow
async def test_a_thousand_open_streams_go_on_side_by_side_and_one_more_begins_at_once(redis_url: str) -> None:
    async with front_end(redis_url=redis_url) as front:
        await create_sessions(front, 0, _STREAMS + 1)
        for worker in front.workers.values():
            worker.pause_s = _PAUSE_S
        files = open_files()
        streams = [asyncio.create_task(stream(front, f"s-{n}")) for n in range(_STREAMS)]

        async def all_are_open() -> bool:
            return sum(worker.deltas_sent for worker in front.workers.values()) >= _STREAMS

        await eventually(all_are_open, within_s=20)
        assert open_files() - files <= _CONNECTIONS
        one_more = await stream(front, f"s-{_STREAMS}")
        assert one_more[0] < _PAUSE_S + 4.0
        times = await asyncio.gather(*streams)
        assert [len(tokens) for tokens in times] == [_TOKENS] * _STREAMS
        ends_s = [tokens[-1] for tokens in times]
        assert max(ends_s) < 2 * min(ends_s), "somebody starves"


async def test_streams_beyond_the_bound_are_refused_at_once_and_told_when_to_come_again() -> None:
    async with front_end(max_streams=2) as front:
        for worker in front.workers.values():
            worker.pause_s = 0.2
        running = [asyncio.create_task(front.turn()) for _ in range(2)]

        async def both_are_open() -> bool:
            return sum(worker.deltas_sent for worker in front.workers.values()) >= 2

        await eventually(both_are_open)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await front.turn()
        assert refused.value.code() is StatusCode.RESOURCE_EXHAUSTED
        assert refused.value.details() == "2 streams are open, 2 may be"
        (retry,) = (detail for detail in details_of(refused.value) if isinstance(detail, error_details_pb2.RetryInfo))
        assert retry.retry_delay.ToNanoseconds() > 0
        await front.new_session()  # other calls go on
        for turn in running:
            assert (await turn).token_ids
        assert (await front.turn()).token_ids
        assert sum(len(worker.generated) for worker in front.workers.values()) == 3
