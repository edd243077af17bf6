"""Workers as Ray actors: started, found again by name, removed. The front end's only file that knows Ray.

The actor class is passed in; it starts serving in its constructor, which Ray runs again after a crash, and has
`async address() -> str` (host:port of its gRPC server), `async pid() -> int` and `async drain(within_s) -> None`.
"""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count as counted
from typing import Any, Final

import ray
import structlog
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util import list_named_actors

from server import ray_scale
from server.errors import WorkerFault
from server.ray_scale import NAMESPACE, WORKER_NAME

_OBJECT_STORE_BYTES: Final = 80 << 20
"""Nothing of ours goes through Ray's object store; this is little above the least that Ray accepts."""
_MOST_LOCAL_WORKERS: Final = 64
"""Ray counts the cores of a machine of our own; who asks for more workers than it has cores may have them."""

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Actor:
    name: str
    args: tuple[Any, ...]
    handle: Any = None
    asked: "asyncio.Future[str] | None" = field(default=None)
    """An unanswered `address()`: an actor that is starting answers only when it is up."""


class RayCluster:
    """A `WorkerAddresses`. Workers are detached actors of the namespace "rekindle", named by worker id.

    `address` names a running cluster; empty starts a local one, on loopback, that ends with `close`.
    """

    def __init__(
        self,
        actor_class: type,
        workers: Mapping[str, tuple[Any, ...]],
        *,
        new_worker: Callable[[str], tuple[Any, ...]] = lambda worker_id: (worker_id,),
        address: str = "",
        gpus_per_worker: float = 0.0,
        cpus_per_worker: float = 1.0,
    ) -> None:
        """`workers` has the constructor's arguments for each worker id, `new_worker` makes them for one more."""
        self._class = actor_class
        self._new_worker = new_worker
        self._actors = {worker_id: _Actor(WORKER_NAME + worker_id, args) for worker_id, args in workers.items()}
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._address = address
        self._gpus = gpus_per_worker
        self._cpus = cpus_per_worker

    async def start(self) -> None:
        """Connect to Ray, then find or create every actor; don't wait until they are up. Raises WorkerFault."""
        try:
            await asyncio.to_thread(ray_scale.check_reachable, self._address)
            await asyncio.to_thread(self._connect)
            await asyncio.to_thread(self._find_others)
            for actor in self._actors.values():
                await asyncio.to_thread(self._find_or_create, actor)
        except (RayError, OSError, ValueError, RuntimeError) as error:
            raise WorkerFault(f"Ray: {error}") from error

    async def wait_until_up(self) -> None:
        """Return when every worker serves. Raises WorkerFault with the reason of one that can't."""
        await asyncio.gather(*(self._answer(worker_id, actor) for worker_id, actor in self._actors.items()))

    async def addresses(self) -> Mapping[str, str]:
        """Where the workers that are up can be reached. Raises nothing: those that are not up are left out."""
        actors = {**self._actors}  # one may come or go meanwhile
        for actor in actors.values():
            self._ask(actor)
        waiting = [actor.asked for actor in actors.values() if actor.asked is not None]
        await asyncio.wait(waiting, timeout=1.0)
        found = {worker_id: self._collect(worker_id, actor) for worker_id, actor in actors.items()}
        return {worker_id: address for worker_id, address in found.items() if address}

    async def pid(self, worker_id: str) -> int:
        """The id of the worker's process, on its machine. Waits until it is up; raises WorkerFault if it can't be."""
        try:
            return int(await asyncio.wrap_future(self._actors[worker_id].handle.pid.remote().future()))
        except RayError as error:
            raise WorkerFault(f"worker {worker_id}: {_reason(error)}") from error

    @property
    def num_workers(self) -> int:
        """Without those that leave."""
        return len(self._actors) - len(self._leaving)

    async def wanted(self) -> int | None:
        """What was asked for through Ray, if anything was."""
        return await asyncio.to_thread(ray_scale.wanted)

    async def reserve(self, count: int) -> None:
        """Have Ray's autoscaler, where there is one, keep machines for so many workers."""
        bundle = {"CPU": self._cpus, "GPU": self._gpus}
        shape = {name: amount for name, amount in bundle.items() if amount}
        try:
            await asyncio.to_thread(request_resources, bundles=[shape] * count)
        except RayError as error:
            raise WorkerFault(f"Ray: {error}") from error

    async def scale_to(self, count: int, *, drain_s: float) -> None:
        """Begin to start workers, or to drain those that were started last, until so many stay. Raises WorkerFault."""
        staying = [worker_id for worker_id in self._actors if worker_id not in self._leaving]
        for worker_id in staying[count:]:
            self._leaving[worker_id] = asyncio.create_task(self._retire(worker_id, drain_s), name=f"drain {worker_id}")
        for _ in range(count - len(staying)):
            worker_id = next(name for name in map(str, counted()) if name not in self._actors)
            actor = _Actor(WORKER_NAME + worker_id, self._new_worker(worker_id))
            try:
                await asyncio.to_thread(self._find_or_create, actor)
            except (RayError, ValueError) as error:
                raise WorkerFault(f"Ray: {error}") from error
            self._actors[worker_id] = actor

    async def _retire(self, worker_id: str, drain_s: float) -> None:
        """It is served from until it has stored what it holds."""
        actor = self._actors[worker_id]
        await self._drain([actor], drain_s)
        await self._remove(actor)
        del self._actors[worker_id], self._leaving[worker_id]
        _log.info("worker has left", worker=worker_id)

    async def stop_workers(self, *, drain_s: float) -> None:
        """Let every worker finish and store what it holds, then remove it."""
        for task in self._leaving.values():
            task.cancel()
        await self._drain([*self._actors.values()], drain_s)
        for actor in self._actors.values():
            await self._remove(actor)
        await asyncio.to_thread(ray_scale.forget)

    async def _drain(self, actors: Sequence[_Actor], drain_s: float) -> None:
        drains = [
            asyncio.wrap_future(actor.handle.drain.remote(drain_s).future())
            for actor in actors
            if actor.handle is not None
        ]
        if drains:
            # Some seconds on top: what a drain does last is to store what is left.
            done, late = await asyncio.wait(drains, timeout=drain_s + 5.0)
            for drain in done:
                if drain.exception() is not None:
                    _log.warning("worker did not drain", error=str(drain.exception()))
            if late:
                _log.warning("workers cut off", count=len(late))

    async def _remove(self, actor: _Actor) -> None:
        if actor.handle is not None:
            await asyncio.to_thread(ray.kill, actor.handle, no_restart=True)
            actor.handle = None

    async def close(self) -> None:
        """Disconnect. Workers on a running cluster go on living, unless `stop_workers` came first."""
        for actor in self._actors.values():
            if actor.asked is not None:
                actor.asked.cancel()
        await asyncio.to_thread(ray.shutdown)

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's own choice is 15: beside anybody else's process, a worker would hardly run.
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # a process for each core that nobody asked for
        common: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "error"}
        if self._address:
            ray.init(address=self._address, **common)
            return
        try:
            self._start_local(common)
        except RuntimeError as error:  # now and then Ray's own control service does not come up; a second one does
            _log.warning("Ray did not start; trying once more", error=str(error))
            ray.shutdown()
            self._start_local(common)

    def _start_local(self, common: dict[str, Any]) -> None:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, _MOST_LOCAL_WORKERS * max(1, round(self._cpus))),
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            **common,
        )

    def _find_others(self) -> None:
        """Workers that were added to a running cluster before this process came to it."""
        for actor in list_named_actors(all_namespaces=True):
            worker_id = actor["name"].removeprefix(WORKER_NAME)
            if actor["namespace"] == NAMESPACE and worker_id != actor["name"] and worker_id not in self._actors:
                self._actors[worker_id] = _Actor(actor["name"], self._new_worker(worker_id))

    def _find_or_create(self, actor: _Actor) -> None:
        actor.handle = (
            ray.remote(self._class)
            .options(
                name=actor.name,
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                max_restarts=-1,
                num_gpus=self._gpus,
                num_cpus=self._cpus,
                scheduling_strategy="SPREAD",
            )
            .remote(*actor.args)
        )

    def _ask(self, actor: _Actor) -> None:
        if actor.asked is None and actor.handle is not None:
            actor.asked = asyncio.wrap_future(actor.handle.address.remote().future())

    def _collect(self, worker_id: str, actor: _Actor) -> str:
        """The answer, if there is one by now."""
        if actor.asked is None or not actor.asked.done():
            return ""
        asked, actor.asked = actor.asked, None
        error = asked.exception()
        if error is None:
            return asked.result()
        if not isinstance(error, RayError):
            raise error
        _log.warning("worker is not up", worker=worker_id, error=_reason(error))
        return ""

    async def _answer(self, worker_id: str, actor: _Actor) -> None:
        """Wait until the worker says its address."""
        while True:
            try:
                await asyncio.wrap_future(actor.handle.address.remote().future())
            except RayActorError as error:
                if _failed_to_start(error):
                    raise WorkerFault(f"worker {worker_id} could not start: {_reason(error)}") from error
                await asyncio.sleep(0.5)  # Ray is restarting it
            except RayTaskError as error:
                raise WorkerFault(f"worker {worker_id}: {_reason(error)}") from error
            else:
                return


def _failed_to_start(error: RayActorError) -> bool:
    """True where the constructor raised: Ray does not try again."""
    return "creation task" in str(error)


def _reason(error: BaseException) -> str:
    """The last line of Ray's report, which is the worker's own error."""
    return str(error).strip().splitlines()[-1].strip()
