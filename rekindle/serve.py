"""The whole system in one piece: Redis if asked for, Ray, workers, front end; and its end, in the opposite order."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace

from rich.console import Console

from cache_store.embedded_redis import RedisServer
from rekindle.settings import Settings
from rekindle.signals import until_signalled, whole
from server.app import Application
from server.errors import WorkerFault
from server.logs import set_up_logs
from server.ray_cluster import RayCluster
from worker.actor import WorkerActor


def serve(settings: Settings) -> None:
    """Run the system until SIGTERM or SIGINT. Exits with a message if it can't start."""
    set_up_logs(settings.server.log_format, settings.server.log_level)
    try:
        asyncio.run(until_signalled(_serve(settings, Console(stderr=True))))
    except (WorkerFault, OSError) as error:
        raise SystemExit(f"rekindle: {error}") from error


async def _serve(settings: Settings, console: Console) -> None:
    async with running_system(settings, console) as application:
        print(f"listening on {application.address}, metrics on http://{application.metrics_address}/", flush=True)
        await asyncio.Event().wait()  # until cancelled


@asynccontextmanager
async def running_system(settings: Settings, console: Console) -> AsyncIterator[Application]:
    """Start everything and yield the front end, which listens. At the end turns finish, what is hot is parked, and
    Ray's actors are removed: within two times `drain_s` and a few seconds.

    Raises WorkerFault if a worker can't start, OSError if a port is taken, StoreUnavailable without redis-server.
    """
    async with AsyncExitStack() as stack:
        settings = stack.enter_context(_with_redis(settings))
        system, patience_s = settings.system, 0.0  # a worker that is not up yet has nothing to lose

        async def stop_workers() -> None:
            await cluster.stop_workers(drain_s=patience_s)

        cluster = RayCluster(
            WorkerActor,
            {str(number): (str(number), settings.worker) for number in range(system.num_workers)},
            address=system.ray_address,
            gpus_per_worker=system.gpus_per_worker,
            cpus_per_worker=system.cpus_per_worker,
        )
        stack.push_async_callback(cluster.close)
        with console.status("starting Ray") as status:
            await whole(cluster.start())
            stack.push_async_callback(stop_workers)
            status.update(f"loading {settings.worker.model} on {system.num_workers} worker(s)")
            await cluster.wait_until_up()
        patience_s = settings.server.drain_s
        application = Application.build(settings.server, cluster)
        stack.push_async_callback(application.aclose)
        await application.start()
        stack.push_async_callback(application.drain)
        yield application


@contextmanager
def _with_redis(settings: Settings) -> Iterator[Settings]:
    """Start the embedded Redis, if asked for, and point everything at it."""
    if not settings.system.embedded_redis:
        yield settings
        return
    with RedisServer() as redis:
        yield replace(
            settings,
            server=replace(settings.server, redis_url=redis.url),
            worker=replace(settings.worker, redis_url=redis.url),
        )
