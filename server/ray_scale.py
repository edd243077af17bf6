"""How many workers a deployment is to have: told through a named actor of Ray's, so from any process that reaches it.

`rekindle scale` tells; the process of `rekindle serve` looks, starts or drains. Knows neither workers nor gRPC.
"""

import socket
import time
from typing import Any, Final

import ray
from ray.exceptions import RayError
from ray.util import list_named_actors

NAMESPACE: Final = "rekindle"
WORKER_NAME: Final = "worker-"
_NAME: Final = "wanted-workers"
_ANSWER_S: Final = 10.0
_REACHABLE_S: Final = 5.0


class WantedWorkers:
    """The actor: it remembers one number. There is none until somebody has asked for one."""

    def __init__(self) -> None:
        self._count = 0

    async def ask(self, count: int) -> None:
        self._count = count

    async def count(self) -> int:
        return self._count


def check_reachable(address: str) -> None:
    """Raise OSError where nobody listens: Ray itself would try for minutes, then end the process. Blocks."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():  # else a local Ray, or "auto"
        socket.create_connection((host, int(port)), timeout=_REACHABLE_S).close()


def wanted() -> int | None:
    """What was asked for last, if anything was. Blocks."""
    try:
        count = int(ray.get(ray.get_actor(_NAME, NAMESPACE).count.remote(), timeout=_ANSWER_S))
    except (ValueError, RayError):  # nobody has asked; or Ray can't say now, and is asked again
        return None
    return count or None  # 0: who asks is about to say


def ask_for(count: int, *, address: str) -> int:
    """Ask whoever serves on the Ray at `address` for so many workers, and return how many it has now. Blocks.

    Raises OSError where there is no such Ray, LookupError where nobody serves on it.
    """
    check_reachable(address)
    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="error")
    now = num_workers()
    if not now:
        raise LookupError(f"nobody serves on the Ray at {address}")
    options: dict[str, Any] = {"name": _NAME, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    actor = ray.remote(WantedWorkers).options(num_cpus=0, max_restarts=-1, **options).remote()
    ray.get(actor.ask.remote(count), timeout=60)
    return now


def num_workers() -> int:
    """Started and not yet gone, be they up or not. Blocks."""
    return sum(actor["name"].startswith(WORKER_NAME) for actor in list_named_actors(all_namespaces=True))


def wait_for(count: int, *, timeout_s: float) -> bool:
    """Until there are so many workers, and all of them answer. False if that took longer. Blocks."""
    give_up_s = time.monotonic() + timeout_s
    while (left_s := give_up_s - time.monotonic()) > 0:
        if num_workers() == count and _all_answer(left_s):
            return True
        time.sleep(0.2)
    return False


def _all_answer(timeout_s: float) -> bool:
    names = [actor["name"] for actor in list_named_actors(all_namespaces=True)]
    try:
        handles = [ray.get_actor(name, NAMESPACE) for name in names if name.startswith(WORKER_NAME)]
        ray.get([handle.address.remote() for handle in handles], timeout=timeout_s)
    except (ValueError, RayError):  # one has gone meanwhile, or is being restarted
        return False
    return True


def forget() -> None:
    """Remove the actor, if there is one. Blocks."""
    try:
        ray.kill(ray.get_actor(_NAME, NAMESPACE), no_restart=True)
    except (ValueError, RayError):
        return
