"""A deployment to be broken: workers and front ends as processes, Redis behind a fault proxy.

Knows settings, ports and files. Knows neither conversations nor which fault comes when.
"""

import asyncio
import json
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chaos_part import Part, Worker
from benchmarks.chaos_ray import RayWorker
from benchmarks.deployment import free_port
from benchmarks.fault_proxy import FaultProxy
from cache_store.embedded_redis import RedisServer

_REDIS_TIMEOUT_S = 1.0
SILENCE_S = 2.0
"""How long a worker may be frozen before its turns go to the other one."""

WORKER = {
    "model": "rekindle-recall",
    # A block that is lost is computed again in another batch. In bfloat16 that rounds otherwise, and where two tokens
    # are about equally likely the reply goes otherwise too: no fault of anybody's, and not to be told from one.
    "dtype": "float32",
    "block_tokens": 16,  # 64 KiB each
    "device_cache_bytes": 16 << 20,  # less than the conversations need together: blocks are evicted too
    "host_cache_bytes": 32 << 20,
    "redis_timeout_s": _REDIS_TIMEOUT_S,
    "restore_timeout_s": 5.0,
    "cpu_threads": 1,
    "self_measure_s": 0.2,
}
_FRONT = {
    "redis_timeout_s": _REDIS_TIMEOUT_S,
    "worker_silence_s": SILENCE_S,
    "worker_poll_s": 0.2,
    "drain_s": 5.0,
    "log_format": "json",
}


@dataclass(frozen=True, slots=True)
class Deployment:
    """Two workers, two front ends, one Redis whose append-only file outlives it, and the proxy in front of it."""

    redis: RedisServer
    proxy: FaultProxy
    workers: Sequence[Worker]
    fronts: Sequence[Part]

    @property
    def parts(self) -> list[Worker]:
        return [*self.workers, *self.fronts]

    async def wait_until_up(self) -> None:
        """All parts have just been started."""
        for part in self.parts:
            await asyncio.to_thread(part.line)


@contextmanager
def deployment(
    *, seed: int, on_ray: bool = False, sealed: bool = False, worker_settings: Mapping[str, object] = WORKER
) -> Iterator[Deployment]:
    """Start everything; nothing is up yet when this yields. `on_ray`: workers are actors, started again by Ray.
    `sealed`: all that Redis has is encrypted."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rekindle-chaos-")))
        slabs = stack.enter_context(tempfile.TemporaryDirectory(prefix="rekindle-chaos-", dir="/dev/shm"))
        redis = stack.enter_context(RedisServer(append_only=True))
        proxy = stack.enter_context(FaultProxy(redis.port, seed=seed))
        shared = {"redis_url": f"redis://127.0.0.1:{proxy.port}", "master_keys": _new_keys(folder) if sealed else ""}
        plans = {"0": "load", "1": "auto"}  # one worker that waits for Redis, and one that weighs it
        configs = {
            number: {**worker_settings, **shared, "restore_plan": plan, "host_cache_dir": slabs}
            for number, plan in plans.items()
        }
        places = folder / "places"
        workers: Sequence[Worker]
        if on_ray:
            ray = Part("ray", ["benchmarks.chaos_ray", json.dumps(configs), str(places)], folder / "ray")
            stack.callback(ray.stop)
            ray.start()
            ray.line()
            workers = [RayWorker(number, ray, places) for number in configs]
        else:
            workers = _processes(configs, places, folder)
        fronts = [_front(number, shared, places, folder) for number in ("0", "1")]
        for part in (*workers, *fronts):
            stack.callback(part.stop)
            part.start()
        yield Deployment(redis, proxy, workers, fronts)


def _processes(configs: Mapping[str, Mapping[str, object]], places: Path, folder: Path) -> list[Part]:
    """Workers on ports that stay."""
    workers = []
    for number, config in configs.items():
        port = free_port()
        flags = ["--worker-id", number, "--port", str(port), "--drain-s", "5", "--config", json.dumps(config)]
        workers.append(Part(f"worker {number}", ["worker", *flags], folder / f"worker-{number}", port=port))
    places.write_text(
        json.dumps({number: {"address": worker.address} for number, worker in zip(configs, workers, strict=True)})
    )
    return workers


def _new_keys(folder: Path) -> str:
    path = folder / "keys"
    path.touch(mode=0o600)
    path.write_text("\n".join(f"{name}:{secrets.token_hex(32)}" for name in ("1", "names")))
    return f"file:{path}"


def _front(number: str, shared: Mapping[str, object], places: Path, folder: Path) -> Part:
    port = free_port()
    config = {**_FRONT, **shared, "port": port, "metrics_port": 0}
    command = ["benchmarks.chaos_front", json.dumps(config), str(places)]
    return Part(f"front end {number}", command, folder / f"front-{number}", port=port)
