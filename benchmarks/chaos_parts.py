"""A deployment to be broken: workers and front ends as processes on ports that stay, Redis behind a fault proxy.

Knows processes, signals and ports. Knows neither conversations nor which fault comes when.
"""

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.deployment import free_port
from benchmarks.fault_proxy import FaultProxy
from cache_store.embedded_redis import RedisServer

_STOP_WITHIN_S = 20.0
_REDIS_TIMEOUT_S = 1.0
LEASE_S = 4.0
"""How long a session stays locked when its front end is killed."""
SILENCE_S = 2.0
"""How long a worker may be frozen before its turns go to the other one."""

_WORKER = {
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
    "lease_s": LEASE_S,
    "worker_silence_s": SILENCE_S,
    "worker_poll_s": 0.2,
    "drain_s": 5.0,
    "log_format": "json",
}


class Use(NamedTuple):
    """What a process holds."""

    memory_bytes: int
    descriptors: int


class Part:
    """A process that says one line of JSON when it is up, and can be killed and started again on its port."""

    def __init__(self, name: str, port: int, command: Sequence[str], log: Path) -> None:
        self.name = name
        self.address = f"127.0.0.1:{port}"
        self._command = [sys.executable, "-m", *command]
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Begin; `line` then says when it is up."""
        assert self._process is None, f"{self.name} runs"
        with self._log.open("a") as log:
            self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=log, text=True)

    def line(self) -> Any:
        """The next line that the process says. Raises RuntimeError, with its last words, where it ends instead."""
        output = self._running.stdout
        assert output is not None
        said = output.readline()
        if not said:
            raise RuntimeError(f"{self.name} ended ({self._running.wait()}): {self._log.read_text()[-2000:]}")
        return json.loads(said)

    def kill(self) -> None:
        """End it as a crash would."""
        process, self._process = self._running, None
        process.kill()
        process.communicate()

    def freeze(self) -> None:
        """Let it neither run nor die, until `thaw`."""
        self._running.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._running.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it in good order, if it runs."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGCONT)  # what is frozen does not hear SIGTERM
        process.terminate()
        try:
            process.communicate(timeout=_STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()

    def use(self) -> Use:
        process = Path(f"/proc/{self._running.pid}")
        pages = int((process / "statm").read_text().split()[1])
        return Use(pages * 4096, sum(1 for _ in (process / "fd").iterdir()))

    def check(self) -> str:
        """Ask an idle worker to prove that its blocks balance. Empty, or what is wrong."""
        self._running.send_signal(signal.SIGUSR1)
        return str(self.line()["check"])

    @property
    def _running(self) -> "subprocess.Popen[str]":
        assert self._process is not None, f"{self.name} does not run"
        return self._process


@dataclass(frozen=True, slots=True)
class Deployment:
    """Two workers, two front ends, one Redis whose append-only file outlives it, and the proxy in front of it."""

    redis: RedisServer
    proxy: FaultProxy
    workers: Sequence[Part]
    fronts: Sequence[Part]

    @property
    def parts(self) -> list[Part]:
        return [*self.workers, *self.fronts]

    async def wait_until_up(self) -> None:
        """All parts have just been started."""
        for part in self.parts:
            await asyncio.to_thread(part.line)


@contextmanager
def deployment(*, seed: int) -> Iterator[Deployment]:
    """Start everything; nothing is up yet when this yields."""
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rekindle-chaos-")))
        slabs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rekindle-chaos-", dir="/dev/shm")))
        redis = stack.enter_context(RedisServer(append_only=True))
        proxy = stack.enter_context(FaultProxy(redis.port, seed=seed))
        redis_url = f"redis://127.0.0.1:{proxy.port}"
        plans = {"0": "load", "1": "auto"}  # one worker that waits for Redis, and one that weighs it
        workers = [_worker(number, plan, redis_url, slabs, logs) for number, plan in plans.items()]
        fronts = [_front(number, workers, redis_url, logs) for number in plans]
        for part in (*workers, *fronts):
            stack.callback(part.stop)
            part.start()
        yield Deployment(redis, proxy, workers, fronts)


def _worker(number: str, plan: str, redis_url: str, slabs: Path, logs: Path) -> Part:
    config = _WORKER | {"redis_url": redis_url, "restore_plan": plan, "host_cache_dir": str(slabs)}
    port = free_port()
    flags = ["--worker-id", number, "--port", str(port), "--drain-s", "5", "--config", json.dumps(config)]
    return Part(f"worker {number}", port, ["worker", *flags], logs / f"worker-{number}")


def _front(number: str, workers: Sequence[Part], redis_url: str, logs: Path) -> Part:
    port = free_port()
    config = _FRONT | {"redis_url": redis_url, "port": port, "metrics_port": 0}
    addresses = {worker.name.removeprefix("worker "): worker.address for worker in workers}
    command = ["benchmarks.chaos_front", json.dumps(config), json.dumps(addresses)]
    return Part(f"front end {number}", port, command, logs / f"front-{number}")
