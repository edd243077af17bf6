"""The worker as a Ray actor: a thin shell around `WorkerApp`. Light to import; Ray itself is known to who starts it."""

import asyncio
import os

from worker.config import WorkerConfig


class WorkerActor:
    """Starts to serve when it is constructed, on the actor's event loop; its methods wait until it does."""

    def __init__(self, worker_id: str, config: WorkerConfig) -> None:
        from worker.app import WorkerApp  # here: whoever only names this class needs no gRPC server
        from worker.logs import set_up_logs

        set_up_logs()
        self._starting = asyncio.get_running_loop().create_task(WorkerApp.start(worker_id, config))

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
