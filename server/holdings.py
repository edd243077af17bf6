"""What each worker holds, as it says itself, and which one a turn should go to by that.

Follows every living worker's events into a routing index for each model. What a worker has not told yet is not known:
where nothing is, nobody is chosen, and the caller chooses by load alone.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import grpc
import structlog

from cache_store.codecs import fidelity_of
from cache_store.ids import DIGEST_BYTES, BlockHash, root_hash
from cache_store.inserts import NO_INSERTS, Inserts
from protos import rekindle_worker_pb2 as wpb
from server.block_holders import Tier
from server.block_names import BlockNames
from server.directory import Worker, WorkerDirectory
from server.errors import WorkerLost, WorkerRefused
from server.routing_index import BlocksChanged, RoutingIndex, Snapshot, WorkerCosts

_SWEEP_S = 0.5
_AGAIN_S = 1.0
"""Before a worker whose stream has ended is asked again,"""
_OLDER_S = 60.0
"""and one that doesn't know the question."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is known of a turn's prompt before it is tokenized: the session's history; without one, input that is
    tokens."""

    tenant: str
    codec: str
    tokens: Sequence[int]
    key: str
    """Equal ones go to the same worker, all else being equal: the session's id, or how the prompt begins."""
    created_ms: int = 0
    """When the session was, whose history it is; 0 without one."""
    inserts: Inserts = NO_INSERTS
    """What is inserted in it."""


class Holdings:
    """Used on one event loop."""

    def __init__(self, directory: WorkerDirectory) -> None:
        self._directory = directory
        self._models: dict[str, _Model] = {}
        self._following: dict[str, asyncio.Task[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._follow_all(), name="follow workers' blocks"),
            asyncio.create_task(self._keep_sweeping(), name="sweep the routing index"),
        ]

    async def aclose(self) -> None:
        tasks = [*self._tasks, *self._following.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks, self._following = [], {}

    def choose(
        self, prompt: Prompt, able: Collection[Worker], *, model: str = "", last_worker_id: str = ""
    ) -> Worker | None:
        """The worker where the prompt costs least, of those that are able. None where too little is known: nothing, or
        not what the session's last worker holds.

        Workers of the session's own model come first: only they can use its KV.
        """
        fingerprints = {worker.description.fingerprint for worker in able}
        if len(fingerprints) != 1 and model not in fingerprints:
            return None
        fingerprint = model if model in fingerprints else next(iter(fingerprints))
        chosen_model = self._models.get(fingerprint)
        if chosen_model is None:
            return None
        by_id = {worker.worker_id: worker for worker in able if worker.description.fingerprint == fingerprint}
        worker_id = chosen_model.choose(prompt, by_id.keys(), last_worker_id)
        return by_id.get(worker_id) if worker_id is not None else None

    def queue_s(self, worker: Worker) -> float:
        """What a new turn would wait for there; 0 where nothing is known."""
        model = self._models.get(worker.description.fingerprint)
        return model.queue_s(worker.worker_id) if model is not None else 0.0

    async def _follow_all(self) -> None:
        while True:
            for worker in self._directory.living():
                known = self._following.get(worker.worker_id)
                if known is None or known.done():
                    task = asyncio.create_task(self._follow(worker), name=f"blocks of {worker.worker_id}")
                    self._following[worker.worker_id] = task
            try:
                async with asyncio.timeout(_AGAIN_S):
                    await self._directory.changed()
            except TimeoutError:
                continue

    async def _follow(self, worker: Worker) -> None:
        """One worker's events, until its stream ends; then it holds nothing that we know of."""
        told = worker.description
        model = self._models.setdefault(told.fingerprint, _Model(told))
        is_older = False
        try:
            async with aclosing(worker.client.watch()) as events:
                async for event in events:
                    if not model.take(worker.worker_id, event):
                        _log.warning("events of a worker's blocks were lost", worker=worker.worker_id)
                        return
        except WorkerRefused as error:
            _log.info("worker's blocks are unknown", worker=worker.worker_id, error=str(error))
            is_older = error.code is grpc.StatusCode.UNIMPLEMENTED
        except WorkerLost as error:
            _log.info("worker's blocks are forgotten", worker=worker.worker_id, error=str(error))
        finally:
            model.leave(worker.worker_id)
        if is_older:  # one that leaves, say, may be back under its name in a moment
            await asyncio.sleep(_OLDER_S)

    async def _keep_sweeping(self) -> None:
        while True:
            busy = [model.index.sweep() for model in self._models.values()]
            await asyncio.sleep(0.0 if any(busy) else _SWEEP_S)


class _Model:
    """The workers that serve one model."""

    def __init__(self, told: wpb.DescribeReply, now: Callable[[], float] = time.monotonic) -> None:
        self.index = RoutingIndex(block_tokens=told.block_tokens, block_bytes=told.block_bytes)
        self._names_from = told.names_from
        self._now = now
        self._now_s = now()
        """Until when the index has counted time."""
        self._names = BlockNames(told.block_tokens)

    def take(self, worker_id: str, event: wpb.BlockEvents) -> bool:
        """False: events were lost."""
        if event.is_snapshot:
            device, host = _unpacked(event.device_stored), _unpacked(event.host_stored)
            self.index.resync(Snapshot(worker_id, 2 * event.number, device, host))
        # A worker's event is two of ours, one for each tier.
        elif not (
            self.index.changed(
                BlocksChanged(
                    worker_id,
                    2 * event.number - 1,
                    Tier.DEVICE,
                    _unpacked(event.device_stored),
                    _unpacked(event.device_removed),
                )
            )
            and self.index.changed(
                BlocksChanged(
                    worker_id, 2 * event.number, Tier.HOST, _unpacked(event.host_stored), _unpacked(event.host_removed)
                )
            )
        ):
            return False
        load = event.load
        costs = WorkerCosts(
            queue_s=load.queue_s,
            token_s=load.token_s,
            host_byte_s=load.host_byte_s,
            shared_byte_s=load.redis_byte_s,
        )
        self._pass_time()
        self.index.report(worker_id, costs)
        return True

    def leave(self, worker_id: str) -> None:
        self.index.leave(worker_id)

    def queue_s(self, worker_id: str) -> float:
        self._pass_time()
        return self.index.queue_s(worker_id)

    def choose(self, prompt: Prompt, able: Collection[str], last_worker_id: str) -> str | None:
        if last_worker_id in able and not self.index.knows(last_worker_id):
            return None  # this front end has just started, or that worker: it may hold all of it
        names = self._names_of(prompt)
        if not names:
            return None  # a prompt like any other: by load alone
        self._pass_time()
        choice = self.index.choose(names, key=prompt.key, last_worker_id=last_worker_id)
        if choice is None or choice.worker_id not in able:
            return None
        self.index.give(choice.worker_id, choice.work_s)
        return choice.worker_id

    def _pass_time(self) -> None:
        now_s = self._now()
        self.index.pass_time(now_s - self._now_s)
        self._now_s = now_s

    def _names_of(self, prompt: Prompt) -> Sequence[BlockHash]:
        """Of the prompt's full blocks."""
        root = root_hash(self._names_from, prompt.tenant, fidelity_of(prompt.codec))
        session = (root, prompt.key, prompt.created_ms) if prompt.created_ms else None
        return self._names.of(prompt.tokens, root, session, prompt.inserts)


def _unpacked(packed: bytes) -> list[bytes]:
    return [packed[at : at + DIGEST_BYTES] for at in range(0, len(packed), DIGEST_BYTES)]
