"""Workers on a real local Ray: started, restarted after a crash and found again, refused with the reason."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest

from server.directory import WorkerDirectory
from server.errors import WorkerFault
from server.ray_cluster import RayCluster
from tests.fake_worker import FakeWorker

pytestmark = pytest.mark.ray


class FakeActor:
    """Serves a fake worker, as the real actor serves an engine."""

    def __init__(self, worker_id: str, problem: str) -> None:
        self._worker = FakeWorker(worker_id)
        self._starting = asyncio.get_running_loop().create_task(self._start(problem))

    async def address(self) -> str:
        return await asyncio.shield(self._starting)

    async def drain(self, within_s: float) -> None:
        await self._worker.kill()

    async def process_id(self) -> int:
        return os.getpid()

    async def _start(self, problem: str) -> str:
        if problem:
            raise ValueError(problem)
        return await self._worker.start()


@pytest.fixture
async def clusters() -> AsyncIterator[list[RayCluster]]:
    """Whatever a test puts in is taken down after it."""
    opened: list[RayCluster] = []
    yield opened
    for cluster in opened:
        await cluster.stop_workers(drain_s=2.0)
        await cluster.close()


async def process_id(cluster: RayCluster, worker_id: str) -> int:
    handle: Any = cluster._actors[worker_id].handle
    return int(await handle.process_id.remote())


async def test_a_crashed_worker_is_restarted_and_found_again(clusters: list[RayCluster]) -> None:
    cluster = RayCluster(FakeActor, {"0": ("0", ""), "1": ("1", "")}, cpus_per_worker=0.5)
    clusters.append(cluster)
    await cluster.start()
    await cluster.wait_until_up()
    before = await cluster.addresses()
    assert set(before) == {"0", "1"}
    directory = WorkerDirectory(cluster, poll_s=0.2, silence_s=10.0, max_message_bytes=1 << 20)
    await directory.start()
    await directory.wait_for_workers(2, timeout_s=10)
    os.kill(await process_id(cluster, "0"), signal.SIGKILL)
    async with asyncio.timeout(10):
        while directory.find("0") is not None:
            await directory.changed()
    assert directory.find("1") is not None
    await directory.wait_for_workers(2, timeout_s=60)
    assert (await cluster.addresses())["1"] == before["1"]
    await directory.aclose()


async def test_a_worker_that_cannot_start_says_why(clusters: list[RayCluster]) -> None:
    cluster = RayCluster(FakeActor, {"0": ("0", "this model has no standard attention")})
    clusters.append(cluster)
    await cluster.start()
    with pytest.raises(WorkerFault, match=r"worker 0.*this model has no standard attention"):
        await cluster.wait_until_up()
    assert await cluster.addresses() == {}


async def test_workers_come_and_go_and_the_directory_follows(clusters: list[RayCluster]) -> None:
    cluster = RayCluster(FakeActor, {"0": ("0", "")}, new_worker=lambda worker_id: (worker_id, ""), cpus_per_worker=0.5)
    clusters.append(cluster)
    await cluster.start()
    directory = WorkerDirectory(cluster, poll_s=0.2, silence_s=5.0, max_message_bytes=1 << 20)
    await directory.start()
    assert await cluster.wanted() is None
    await cluster.reserve(3)
    await cluster.scale_to(3, drain_s=2.0)
    assert cluster.num_workers == 3
    await directory.wait_for_workers(3, timeout_s=30)
    first = directory.find("0")
    await cluster.scale_to(1, drain_s=2.0)
    assert cluster.num_workers == 1
    await cluster.scale_to(2, drain_s=2.0)  # while two still leave, under their names
    async with asyncio.timeout(20):
        while {worker.worker_id for worker in directory.known()} != {"0", "3"} or directory.find("3") is None:
            await directory.changed()
    assert directory.find("0") is first
    await directory.aclose()


async def test_a_cluster_that_is_not_there_is_said_so() -> None:
    with pytest.raises(WorkerFault, match="Ray"):
        await RayCluster(FakeActor, {"0": ("0", "")}, address="127.0.0.1:1").start()


async def test_a_front_end_that_restarts_finds_its_workers_alive(running_ray: str) -> None:
    workers = {"0": ("0", "")}
    before = RayCluster(FakeActor, workers, address=running_ray)
    await before.start()
    await before.wait_until_up()
    where, process = await before.addresses(), await process_id(before, "0")
    await before.close()
    after = RayCluster(FakeActor, workers, address=running_ray)
    await after.start()
    await after.wait_until_up()
    assert (await after.addresses(), await process_id(after, "0")) == (where, process)
    await after.stop_workers(drain_s=2.0)
    await after.close()
