"""Workers as Ray actors, to be broken: a process that starts them, says where they are, and leaves restarts to Ray.

`python -m benchmarks.chaos_ray CONFIGS PLACES`: WorkerConfig by worker id as JSON, and the file that says address and
process id of each that is up. On SIGUSR1 all prove that their blocks balance, on SIGTERM they go.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.chaos_part import Part, Use, use_of

_LOOK_S = 0.1
_UP_WITHIN_S = 90.0


class RayWorker:
    """A `Worker` that is an actor of the process `cluster`."""

    def __init__(self, number: str, cluster: Part, places: Path) -> None:
        self.name = f"worker {number}"
        self._number, self._cluster, self._places = number, cluster, places
        self._pid = 0

    @property
    def address(self) -> str:
        return str(json.loads(self._places.read_text())[self._number]["address"])

    def start(self) -> None:
        """Ray does."""

    def line(self) -> Any:
        give_up_s = time.monotonic() + _UP_WITHIN_S
        while time.monotonic() < give_up_s:
            place = json.loads(self._places.read_text()).get(self._number)
            if place is not None and place["pid"] != self._pid:
                self._pid = place["pid"]
                return place
            time.sleep(_LOOK_S)
        raise RuntimeError(f"Ray has not started {self.name} again within {_UP_WITHIN_S:g} s")

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)

    def freeze(self) -> None:
        os.kill(self._pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self._pid, signal.SIGCONT)

    def stop(self) -> None:
        """Its cluster does."""

    def use(self) -> Use:
        return use_of(self._pid)

    def check(self) -> str:
        """Of all workers."""
        return self._cluster.check()


async def _serve(configs: Mapping[str, Mapping[str, Any]], places: Path, say: Callable[[dict[str, Any]], None]) -> None:
    # Here: the storm itself runs without Ray.
    from cache_store.errors import ServingError
    from server.ray_cluster import RayCluster
    from worker.actor import WorkerActor
    from worker.config import WorkerConfig

    stopped, asked = asyncio.Event(), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, asked.set)
    workers = {number: (number, WorkerConfig(**config)) for number, config in configs.items()}
    cluster = RayCluster(WorkerActor, workers, cpus_per_worker=1.0)
    try:
        await cluster.start()
        await cluster.wait_until_up()
        is_up = False
        while not stopped.is_set():
            try:
                addresses = await cluster.addresses()
                found = {
                    number: {"address": address, "pid": await cluster.pid(number)}
                    for number, address in addresses.items()
                }
            except ServingError:
                continue  # one has just died: it is left out as soon as Ray knows
            _write(places, found)
            if not is_up:
                say({"up": True})
                is_up = True
            if asked.is_set():
                asked.clear()
                say({"check": await _check(list(configs))})
            await asyncio.sleep(_LOOK_S)
        await cluster.stop_workers(drain_s=2.0)
    finally:
        await cluster.close()


def _write(places: Path, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Whole at every moment: front ends read it."""
    draft = places.with_suffix(".new")
    draft.write_text(json.dumps(found))
    draft.replace(places)


async def _check(numbers: list[str]) -> str:
    """What is wrong with any of the workers."""
    import ray

    from server.ray_scale import NAMESPACE

    handles = [ray.get_actor(f"worker-{number}", namespace=NAMESPACE) for number in numbers]
    problems = await asyncio.gather(*(asyncio.wrap_future(handle.check.remote().future()) for handle in handles))
    return "; ".join(problem for problem in problems if problem)


def _main() -> None:
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as lines:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Ray shows its actors' logs there, between our lines

        def say(line: dict[str, Any]) -> None:
            print(json.dumps(line), file=lines, flush=True)

        asyncio.run(_serve(json.loads(sys.argv[1]), Path(sys.argv[2]), say))


if __name__ == "__main__":
    _main()
