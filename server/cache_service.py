"""Cache over gRPC: to operators what all workers and Redis say of themselves, summed; to a tenant what is its own."""

import asyncio
from typing import Any

import grpc.aio

from cache_store.errors import ServingError, StoreError
from cache_store.records import RecordStore
from protos import rekindle_pb2 as pb
from protos.rekindle_pb2_grpc import CacheServicer
from server.directory import Worker, WorkerDirectory
from server.identity import caller
from server.metrics import SOURCES, FrontMetrics, Tokens


class CacheService(CacheServicer):
    def __init__(self, records: RecordStore, directory: WorkerDirectory, metrics: FrontMetrics) -> None:
        self._records = records
        self._directory = directory
        self._metrics = metrics

    async def GetCacheStats(
        self, request: pb.GetCacheStatsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.CacheStats:
        who = caller()
        if not who.operator:  # how full the tiers are tells of others
            return rated(self._metrics.prompt_tokens_of(who.tenant))
        answers = await asyncio.gather(*(_stats(worker) for worker in self._directory.living()))
        return summed([answer for answer in answers if answer is not None], await self._redis())

    async def _redis(self) -> pb.RedisStats:
        try:
            info = await self._records.info()
        except StoreError:
            return pb.RedisStats(available=False)
        return pb.RedisStats(
            available=True,
            used_bytes=info.used_bytes,
            max_bytes=info.max_bytes,
            evicted_keys=info.evicted_keys,
            eviction_policy=info.eviction_policy,
        )


async def _stats(worker: Worker) -> pb.WorkerCacheStats | None:
    """None from a worker that has just gone: the others' figures stand."""
    try:
        return await worker.client.stats()
    except ServingError:
        return None


def summed(workers: list[pb.WorkerCacheStats], redis: pb.RedisStats) -> pb.CacheStats:
    tokens = {source: sum(getattr(worker.prompt_tokens, source) for worker in workers) for source in SOURCES}
    stats = rated(tokens)
    stats.workers.extend(workers)
    stats.redis.CopyFrom(redis)
    return stats


def rated(tokens: Tokens) -> pb.CacheStats:
    """Rates are ratios of sums, never means of rates."""
    all_tokens = max(1, sum(tokens.values()))
    return pb.CacheStats(
        prompt_tokens=pb.TokensBySource(**tokens),
        hit_rate=sum(tokens[source] for source in SOURCES if source != "computed") / all_tokens,
        device_hit_rate=tokens["device"] / all_tokens,
        host_hit_rate=tokens["host"] / all_tokens,
        disk_hit_rate=tokens["disk"] / all_tokens,
        redis_hit_rate=tokens["redis"] / all_tokens,
    )
