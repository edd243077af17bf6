"""The worker as a Ray actor: a thin shell around `WorkerApp`. Light to import; Ray itself is known to who starts it."""

import asyncio
import os
from typing import TYPE_CHECKING

from worker.config import WorkerConfig

if TYPE_CHECKING:
    from worker.app import WorkerApp


class WorkerActor:
    """Starts to serve when it is constructed, on the actor's event loop; its methods wait until it does."""

    def __init__(self, worker_id: str, config: WorkerConfig) -> None:
        from worker.logs import set_up_logs

        set_up_logs()
        self._starting = asyncio.get_running_loop().create_task(_start(worker_id, config))

    async def address(self) -> str:
        """host:port of the worker's gRPC server. Raises what kept it from starting."""
        return (await asyncio.shield(self._starting)).address

    async def metrics_address(self) -> str:
        """host:port of its Prometheus endpoint."""
        return (await asyncio.shield(self._starting)).metrics_address

    async def pid(self) -> int:
        """Of the process that Ray runs it in."""
        return os.getpid()

    async def check(self) -> str:
        """Prove that the worker's blocks balance, in an idle moment. Empty, or what is wrong."""
        return await (await asyncio.shield(self._starting)).check()

    async def drain(self, within_s: float) -> None:
        """Let running turns finish within `within_s`, store what is left, stop. Then the actor can be killed."""
        await (await asyncio.shield(self._starting)).stop(within_s=within_s)


async def _start(worker_id: str, config: WorkerConfig) -> "WorkerApp":
    from worker.app import WorkerApp  # here: whoever only names the actor's class needs no gRPC server
    from worker.collector import look_past_what_is_there

    app = await WorkerApp.start(worker_id, config)
    look_past_what_is_there()
    return app
