"""The whole system in one piece: Redis if asked for, Ray, workers, front end; and its end, in the opposite order."""

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from secrets import token_hex

from rich.console import Console

from cache_store.embedded_redis import RedisServer
from cache_store.errors import ServingError
from cache_store.host_claim import deployment_folder
from rekindle.settings import Settings, SystemConfig
from rekindle.signals import StopSignals, whole
from server.app import Application
from server.autoscale import Autoscaler
from server.config import ConfigError
from server.logs import set_up_logs
from server.ray_cluster import RayCluster
from server.scaling import Scaling
from worker.actor import WorkerActor
from worker.config import AUTO, WorkerConfig


def serve(settings: Settings) -> None:
    """Run the system until SIGTERM or SIGINT. Exits with a message if it can't start."""
    set_up_logs(settings.server.log_format, settings.server.log_level)
    try:
        asyncio.run(_serve(settings, Console(stderr=True)))
    except (ServingError, ConfigError, OSError) as error:
        raise SystemExit(f"rekindle: {error}") from error


async def _serve(settings: Settings, console: Console) -> None:
    with StopSignals() as signals:
        async with running_system(settings, console, signals) as system:
            front_end = system.front_end
            gc.collect()
            gc.freeze()  # from now on the collector looks for turns' garbage, and past what is here to stay
            scheme = "https" if settings.server.tls_cert else "http"
            http = f", HTTP on {scheme}://{front_end.http_address}/" if front_end.http_address else ""
            print(f"listening on {front_end.address}{http}, metrics on http://{front_end.metrics_address}/", flush=True)
            await asyncio.Event().wait()  # until a signal


@dataclass(frozen=True, slots=True)
class System:
    """What runs."""

    front_end: Application
    cluster: RayCluster


@asynccontextmanager
async def running_system(settings: Settings, console: Console, signals: StopSignals) -> AsyncIterator[System]:
    """Start everything; the workers are up and the front end listens when this yields.

    At the end turns finish, what is hot is parked, and Ray's actors are removed: within two times `drain_s` and a few
    seconds. Raises WorkerFault if a worker can't start, OSError if a port is taken, StoreUnavailable without a
    redis-server, and for files of keys what Application.build raises.
    """
    async with AsyncExitStack() as stack:
        settings = stack.enter_context(_with_redis(settings))
        settings = stack.enter_context(_with_host_folder(settings))
        system, patience_s = settings.system, 0.0  # a worker that is not up yet has nothing to lose

        async def stop_workers() -> None:
            await cluster.stop_workers(drain_s=patience_s)

        def new_worker(worker_id: str) -> tuple[str, WorkerConfig]:
            return worker_id, settings.worker

        cluster = RayCluster(
            WorkerActor,
            {str(number): new_worker(str(number)) for number in range(system.num_workers)},
            new_worker=new_worker,
            address=system.ray_address,
            gpus_per_worker=system.gpus_per_worker,
            cpus_per_worker=system.reserved_cpus,
        )
        front_end = Application.build(settings.server, cluster)  # first: what can't be read is found out at once
        stack.push_async_callback(cluster.close)
        with console.status("starting Ray") as status:
            await whole(cluster.start())
            stack.push_async_callback(stop_workers)
            signals.arm()
            status.update(f"loading {settings.worker.model} on {system.num_workers} worker(s)")
            await cluster.wait_until_up()
        patience_s = settings.server.drain_s
        stack.push_async_callback(front_end.aclose)
        await front_end.start()
        stack.push_async_callback(front_end.drain)
        autoscaler = _autoscaler(system)
        scaling = Scaling(cluster, front_end.directory, autoscaler, drain_s=settings.server.drain_s)
        stack.push_async_callback(_ended, asyncio.create_task(scaling.run(), name="scaling"))
        yield System(front_end, cluster)


def _autoscaler(system: SystemConfig) -> Autoscaler | None:
    if not system.max_workers:
        return None
    return Autoscaler(
        system.min_workers,
        system.max_workers,
        up_after_s=system.scale_up_after_s,
        down_after_s=system.scale_down_after_s,
    )


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


@contextmanager
def _with_redis(settings: Settings) -> Iterator[Settings]:
    """Start the embedded Redis, if asked for, and point everything at it."""
    if not settings.system.embedded_redis:
        yield settings
        return
    with RedisServer(password=token_hex()) as redis:  # loopback is for all users of this machine
        yield replace(
            settings,
            server=replace(settings.server, redis_url=redis.url),
            worker=replace(settings.worker, redis_url=redis.url),
        )


@contextmanager
def _with_host_folder(settings: Settings) -> Iterator[Settings]:
    """Give the workers of a Ray of our own a folder of shared memory, if they may have one; it goes when they have."""
    is_private = settings.system.ray_address or settings.worker.master_keys  # the folder's files are not sealed
    if settings.worker.host_cache_dir != AUTO or is_private:
        yield settings
        return
    with deployment_folder() as folder:
        yield replace(settings, worker=replace(settings.worker, host_cache_dir=str(folder or "")))
