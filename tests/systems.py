"""Whole systems for tests: worker processes that can be killed, a front end in this process, clients, real Redis."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from functools import cached_property
from itertools import count
from types import TracebackType
from typing import Any, Self

import grpc.aio
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from transformers import PreTrainedModel

from cache_store.codecs import fidelity_of
from cache_store.embedded_redis import RedisServer
from cache_store.ids import root_hash
from protos import rekindle_pb2 as pb
from protos import rekindle_pb2_grpc as pb_grpc
from rekindle.client import Client, Generation, Input
from server.app import Application
from server.config import ServerConfig
from server.directory import StaticAddresses
from server.router import Candidate, choose
from tests.forked_worker import fork_worker
from worker.engine.prefix import wanted_by_history
from worker.model.presets import preset_config, random_model

BLOCK_TOKENS = 16
_WORKER_SETTINGS = {
    "model": "preset:tiny",
    "block_tokens": BLOCK_TOKENS,
    "device_cache_bytes": 16 << 20,  # 256 blocks, 4096 tokens: the whole of the model's window
    "host_cache_bytes": 16 << 20,
    "redis_url": "",
    "redis_timeout_s": 1.0,
    "cpu_threads": 1,
    "restore_plan": "load",  # what is computed is faster than any restore, in models as small as these
}


class WorkerProcess:
    """`python -m worker` on free ports, from construction on. It is up when its address is known."""

    def __init__(self, worker_id: str, **settings: object) -> None:
        """`settings` are of WorkerConfig; and `drain_s`, how long it lets its turns run when it is to go."""
        self.worker_id = worker_id
        drain_s = settings.pop("drain_s", 2)
        config = json.dumps(_WORKER_SETTINGS | settings)
        self._process, self._output = fork_worker(
            "--worker-id", worker_id, "--drain-s", str(drain_s), "--config", config
        )

    @cached_property
    def _addresses(self) -> dict[str, str]:
        line = self._output.readline()
        assert line, f"the worker did not start: exit status {self._wait(15)}"
        addresses: dict[str, str] = json.loads(line)
        return addresses

    @property
    def address(self) -> str:
        """host:port of its gRPC server. Waits until the worker is up."""
        return self._addresses["address"]

    @property
    def metrics_address(self) -> str:
        return self._addresses["metrics_address"]

    def leave(self, *, within_s: float) -> None:
        """Tell it to go, as whoever rolls out a new version would, and wait until it has."""
        self._process.terminate()
        assert self._wait(within_s) == 0

    def kill(self) -> None:
        """End it as a crash would, and wait until it is gone."""
        self._process.kill()
        self._process.join()

    def freeze(self) -> None:
        """Stop it where it is, its connections open."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def _wait(self, within_s: float) -> int | None:
        """Its exit status, or None if it still runs after `within_s`."""
        self._process.join(within_s)
        return self._process.exitcode

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            assert self._wait(15) is not None, f"worker {self.worker_id} did not end"
        finally:
            self.kill()
            self._process.close()
            self._output.close()


class System:
    """A front end, its client, and the bare gRPC beneath it."""

    def __init__(self, application: Application, client: Client, channel: grpc.aio.Channel) -> None:
        self.application = application
        self.client = client
        self.inference: Any = pb_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]  # generated code
        self.sessions: Any = pb_grpc.SessionsStub(channel)  # type: ignore[no-untyped-call]
        self._health: Any = health_pb2_grpc.HealthStub(channel)

    async def say(self, input: Input, session_id: str = "", *, max_new_tokens: int = 12, **sampling: Any) -> "Turn":
        """Run a turn to its end and hold its receipt to its promise."""
        generation = self.client.generate(input, session_id=session_id, max_new_tokens=max_new_tokens, **sampling)
        deltas = [delta async for delta in generation]
        assert generation.finished is not None
        return Turn(generation, deltas, generation.finished)

    async def is_serving(self, part: str) -> bool:
        """What grpc.health.v1 says of a part."""
        reply = await self._health.Check(health_pb2.HealthCheckRequest(service=part))
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    async def worker_stats(self, worker_id: str) -> pb.WorkerCacheStats:
        stats = await self.client.stats()
        return next(worker for worker in stats.workers if worker.worker_id == worker_id)

    async def is_idle(self) -> bool:
        """Whether no worker has a request."""
        return not any(worker.running or worker.waiting for worker in (await self.client.stats()).workers)


class Turn:
    """A turn that has ended well."""

    def __init__(self, generation: Generation, deltas: Sequence[pb.Delta], finished: pb.Finished) -> None:
        self.text = generation.text
        self.token_ids = generation.token_ids
        self.logprobs = generation.logprobs
        self.deltas = deltas
        self.finished = finished
        self.receipt = receipt = finished.receipt
        below = receipt.host_tokens + receipt.disk_tokens + receipt.redis_tokens
        by_source = receipt.device_tokens + below + receipt.computed_tokens + receipt.context.left_tokens
        assert by_source == finished.usage.prompt_tokens
        assert sum(miss.tokens for miss in receipt.misses) == receipt.computed_tokens
        assert finished.usage.completion_tokens == len(self.token_ids)


@asynccontextmanager
async def running_system(redis_url: str, workers: Sequence[WorkerProcess], **settings: Any) -> AsyncIterator[System]:
    """A front end for these workers, on free ports."""
    config = ServerConfig(
        **{
            "port": 0,
            "metrics_port": 0,
            "redis_url": redis_url,
            "redis_timeout_s": 1.0,
            "worker_poll_s": 0.1,
            "drain_s": 5.0,
            **settings,
        }
    )
    application = Application.build(config, StaticAddresses({w.worker_id: w.address for w in workers}))
    try:
        await application.start()
        async with Client(application.address) as client, grpc.aio.insecure_channel(application.address) as channel:
            yield System(application, client, channel)
    finally:
        await application.aclose()


def chat(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def session_for(worker_id: str, among: Sequence[str]) -> str:
    """A session id that the router gives to this worker, all being equally busy."""
    candidates = [Candidate(other, 0, "") for other in among]
    names = (f"session-{number}" for number in count())
    return next(name for name in names if choose(candidates, key=name) == worker_id)


def block_keys(session: pb.Session, block_tokens: int = BLOCK_TOKENS) -> list[str]:
    """The Redis keys of a session's blocks, as they follow from its tokens alone."""
    root = root_hash(bytes.fromhex(session.model), "default", fidelity_of(session.codec))
    return [f"rekindle:b:{want.name.hex()}" for want in wanted_by_history(root, session.token_ids, block_tokens)]


async def eventually(check: Callable[[], Awaitable[bool]], *, within_s: float = 5.0) -> None:
    """Return as soon as `check` is true."""
    give_up = time.monotonic() + within_s
    while not await check():
        assert time.monotonic() < give_up, f"did not happen within {within_s:g} s"
        await asyncio.sleep(0.02)


async def scrape(address: str) -> dict[str, float]:
    """The samples of a Prometheus endpoint, each as `name` or `name{label=value,...}`."""
    reader, writer = await asyncio.open_connection(*address.split(":"))
    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
    body = (await reader.read()).partition(b"\r\n\r\n")[2].decode()
    writer.close()
    await writer.wait_closed()
    samples = {}
    for family in text_string_to_metric_families(body):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return samples


@pytest.fixture(scope="session")
def workers(redis_server: RedisServer) -> Iterator[tuple[WorkerProcess, WorkerProcess]]:
    """Two workers on the shared Redis, for all tests. They remember: a test's prompts are its own."""
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(WorkerProcess(worker_id, redis_url=redis_server.url)) for worker_id in ("0", "1")
        )
        assert first.address != second.address
        yield first, second


@pytest.fixture(scope="session")
def narrow_worker() -> Iterator[WorkerProcess]:
    """A worker without Redis that runs one request, lets one wait, and has no more room than one of them may need."""
    settings: dict[str, object] = {"max_running": 1, "max_waiting": 1, "device_cache_bytes": 4 << 20}
    with WorkerProcess("narrow", **settings) as worker:
        yield worker


@pytest.fixture
async def system(redis_url: str, workers: tuple[WorkerProcess, WorkerProcess]) -> AsyncIterator[System]:
    """The two workers and a front end, with an empty Redis."""
    async with running_system(redis_url, workers) as system:
        yield system


@pytest.fixture
async def narrow_system(redis_url: str, narrow_worker: WorkerProcess) -> AsyncIterator[System]:
    async with running_system(redis_url, [narrow_worker]) as system:
        yield system


@pytest.fixture(scope="session")
def transformers_model() -> PreTrainedModel:
    """The workers' model, as transformers runs it."""
    return random_model(preset_config("tiny"), torch.float32, 0).eval()


class Truth:
    """What transformers says to the same tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def confirms(self, session: pb.Session) -> bool:
        """Whether each token of each reply is the likeliest after all before it."""
        with torch.inference_mode():
            logits = self._model(torch.tensor([session.token_ids])).logits[0]
        likeliest = logits.argmax(dim=-1).tolist()
        return bool(session.turns) and all(
            likeliest[turn.reply_start - 1 : turn.end - 1] == session.token_ids[turn.reply_start : turn.end]
            for turn in session.turns
        )


@pytest.fixture
def truth(transformers_model: PreTrainedModel) -> Truth:
    return Truth(transformers_model)
