"""What load balancers are told, and how soon."""

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cache_store.embedded_redis import RedisServer
from tests.fake_worker import FrontEnd, front_end

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def check(front: FrontEnd, part: str = "") -> int:
    stub: Any = health_pb2_grpc.HealthStub(front.channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest(service=part))).status)


class Watch:
    """A client that watches one part."""

    def __init__(self, front: FrontEnd, part: str) -> None:
        stub: Any = health_pb2_grpc.HealthStub(front.channel)
        self._call = stub.Watch(health_pb2.HealthCheckRequest(service=part))

    async def next(self) -> int:
        async with asyncio.timeout(5):
            return int((await self._call.read()).status)


async def test_all_parts_serve_when_all_are_there(redis_url: str) -> None:
    async with front_end(redis_url=redis_url) as front:
        for part in ("", "redis", "worker/0", "worker/1"):
            assert await check(front, part) == SERVING


async def test_an_unknown_part_is_not_found() -> None:
    async with front_end() as front:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check(front, "worker/9")
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_watchers_hear_of_workers_that_go_and_come_back() -> None:
    async with front_end() as front:
        whole, one = Watch(front, ""), Watch(front, "worker/1")
        assert (await whole.next(), await one.next()) == (SERVING, SERVING)
        await front.kill("1")
        assert await one.next() == NOT_SERVING
        assert await check(front) == SERVING  # the other worker is left
        await front.kill("0")
        assert await whole.next() == NOT_SERVING
        await front.workers["1"].start()
        assert (await one.next(), await whole.next()) == (SERVING, SERVING)


async def test_a_worker_that_drains_is_not_serving() -> None:
    async with front_end() as front:
        watch = Watch(front, "worker/0")
        assert await watch.next() == SERVING
        front.workers["0"].accepting = False
        assert await watch.next() == NOT_SERVING


async def test_a_front_end_without_workers_starts_and_says_so() -> None:
    async with front_end(num_workers=0) as front:
        assert await check(front) == NOT_SERVING


async def test_without_redis_the_server_serves_and_redis_does_not(own_redis: RedisServer) -> None:
    own_redis.stop()
    async with front_end(redis_url=own_redis.url, redis_timeout_s=0.2) as front:
        redis = Watch(front, "redis")
        assert await redis.next() == NOT_SERVING
        assert await check(front) == SERVING
        own_redis.start()
        assert await redis.next() == SERVING
        own_redis.pause()
        assert await redis.next() == NOT_SERVING
        own_redis.resume()
        assert await redis.next() == SERVING
        assert await check(front) == SERVING


async def test_a_front_end_that_drains_says_goodbye_first() -> None:
    async with front_end() as front:
        watch = Watch(front, "")
        assert await watch.next() == SERVING
        await front.app.drain()
        assert await watch.next() == NOT_SERVING
        assert await check(front, "worker/0") == NOT_SERVING
