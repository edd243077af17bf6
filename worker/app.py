"""The composition root of a worker: from settings to a serving engine, and back to nothing. Knows no Ray."""

import asyncio
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

import grpc.aio
import structlog

from protos.tls import ServerTls
from worker.config import WorkerConfig
from worker.embedding_service import EmbeddingService
from worker.engine_like import EngineLike
from worker.metrics import WorkerMetrics
from worker.service import WorkerService, start_server

if TYPE_CHECKING:
    from worker.model.embedder import Embedder
    from worker.model.embedder_files import EmbedderFiles
    from worker.text import TextCodec

_ANSWER_S = 0.5
_BROKEN_STATUS = 70
"""Of a process whose engine is broken: EX_SOFTWARE."""

_log = structlog.get_logger(__name__)


class WorkerApp:
    """An engine and its servers, on the event loop that started them."""

    def __init__(
        self,
        engine: EngineLike,
        service: WorkerService,
        server: grpc.aio.Server,
        metrics: WorkerMetrics,
        *,
        on_broken: Callable[[], None] = lambda: os._exit(_BROKEN_STATUS),
    ) -> None:
        """`on_broken` is called when the engine can't run any more: the process ends, and whoever started it (Ray, say)
        starts another one."""
        self._engine = engine
        self._on_broken = on_broken
        self._watching = asyncio.create_task(self._watch(), name="watch the engine")
        self._service = service
        self._server = server
        self._metrics = metrics
        self._stopping: asyncio.Task[None] | None = None
        self.address = ""
        """host:port of the gRPC server."""
        self.metrics_address = ""
        """host:port of the Prometheus endpoint."""

    @classmethod
    async def start(cls, worker_id: str, config: WorkerConfig, *, port: int = 0) -> Self:
        """Load the model (it takes a while: on a thread) and serve. Raises ModelRefused, InvalidRequest, OSError."""
        engine, codec, embedding = await asyncio.to_thread(_build, config)
        metrics = WorkerMetrics(engine.stats)
        try:
            metrics_address = f"{config.listen_host}:{metrics.serve(config.listen_host, config.metrics_port)}"
            service = WorkerService(
                engine,
                codec,
                worker_id=worker_id,
                model=config.model,
                metrics_address=metrics_address,
                on_receipt=metrics.turn_finished,
                embedding=embedding,
            )
            tls = ServerTls(config.tls_cert, config.tls_key, config.tls_client_ca)
            server, address = await start_server(service, config.listen_host, port, tls)
        except BaseException:
            metrics.close()
            await asyncio.to_thread(engine.close)
            raise
        app = cls(engine, service, server, metrics)
        app.address, app.metrics_address = address, metrics_address
        _log.info("worker serves", worker=worker_id, model=config.model, address=address, metrics=metrics_address)
        return app

    async def _watch(self) -> None:
        await asyncio.shield(asyncio.wrap_future(self._engine.broken))
        _log.critical("the engine is broken: this worker ends")
        await asyncio.sleep(_ANSWER_S)  # what its turns are told is on its way
        self._on_broken()

    async def check(self) -> str:
        """Prove that the engine's blocks balance, in an idle moment. Empty, or what is wrong."""
        try:
            await asyncio.to_thread(self._engine.check)
        except AssertionError as error:
            return str(error) or "an assertion failed"
        return ""

    async def stop(self, *, within_s: float) -> None:
        """Let running turns finish within `within_s`, store what is not yet stored, and go. Called again: wait."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(within_s))
        await asyncio.shield(self._stopping)

    async def _stop(self, within_s: float) -> None:
        self._service.accepting = False
        self._watching.cancel()
        await asyncio.to_thread(self._engine.drain, within_s)
        await asyncio.to_thread(self._engine.close)
        await self._server.stop(grace=1.0)  # the last answers are on their way
        self._service.close()
        self._metrics.close()


def _build(config: WorkerConfig) -> tuple[EngineLike, "TextCodec", EmbeddingService | None]:
    # Here, because they bring torch and transformers with them.
    from worker.engine.build_engine import build_engine
    from worker.model.embedder_files import read_embedder
    from worker.text import load_tokenizer

    files = read_embedder(config.embedder)  # first: what is wrong with it is found before minutes of loading
    engine = build_engine(config)
    try:
        codec = load_tokenizer(config.model, engine.vocab_size)
    except BaseException:
        engine.close()
        raise
    return engine, codec, None if files is None else _embedding(files, config)


def _embedding(files: "EmbedderFiles", config: WorkerConfig) -> EmbeddingService:
    def load() -> "Embedder":
        from worker.model.embedder import Embedder
        from worker.model.load import choose_device

        return Embedder(files, choose_device(config.device))

    return EmbeddingService(files.digest, files.dim, load)
