"""The composition root of the front end: from settings to a running server, and back to nothing."""

import asyncio
from typing import TYPE_CHECKING, Self

import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cache_store.bank_store import BankStore
from cache_store.master_keys import load_keyring
from cache_store.open_banks import open_banks
from cache_store.open_records import open_records
from cache_store.records import RecordStore
from protos import rekindle_memory_pb2 as mpb
from protos import rekindle_memory_pb2_grpc as mpb_grpc
from protos import rekindle_pb2 as pb
from protos import rekindle_pb2_grpc as pb_grpc
from protos.tls import ServerTls, Tls, is_loopback, listen
from server.banks.counted_embedding import CountedEmbedding
from server.banks.keeper import BankKeeper
from server.banks.shared_questions import SharedQuestions
from server.cache_service import CacheService
from server.calls import Calls
from server.config import ServerConfig
from server.directory import WorkerAddresses, WorkerDirectory
from server.embedding import Embedding
from server.episodes import Episodes
from server.health import Health
from server.holdings import Holdings
from server.identity import Identities
from server.lease import Leases
from server.limits import Limits
from server.memories import Memories
from server.memory_service import MemoryService
from server.metrics import FrontMetrics
from server.notes import Notes
from server.prefilling import Prefilling
from server.relay import Relay
from server.service import InferenceService
from server.session_blocks import SessionBlocks
from server.sessions import SessionKeeper
from server.sessions_service import SessionsService
from server.tenants_service import TenantsService
from server.turns import Turns

_UNWIND_S = 5.0
_log = structlog.get_logger(__name__)


if TYPE_CHECKING:
    from server.http_app import HttpServer


class Application:
    """A front end. `start`, then `drain`, then `aclose`; or `serve` for all three."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        records: RecordStore,
        banks: BankStore,
        directory: WorkerDirectory,
        metrics: FrontMetrics,
    ) -> None:
        self._config = config
        self._records = records
        self._bank_store = banks
        self.directory = directory
        self.metrics = metrics
        self._identities = Identities(config)
        self._calls = Calls(metrics, self._identities, max_streams=config.max_streams)
        self._limits = Limits(self._identities, records)
        self._holdings = Holdings(directory)
        relay = Relay(directory, self._holdings, metrics, config)
        self._leases = Leases(records, lease_s=config.lease_s)
        self._prefilling = Prefilling(banks, directory, metrics, codec=config.codec)
        self._banks = BankKeeper(
            banks,
            SharedQuestions(CountedEmbedding(Embedding(directory), metrics)),
            max_entries=config.bank_max_entries,
            max_index_bytes=config.bank_index_bytes,
            prefills=self._prefilling,
        )
        self._episodes = Episodes(self._banks, metrics)
        self._notes = Notes(self._banks, directory, self._holdings, metrics)
        memories = Memories(self._banks, directory, self._prefilling, metrics, read_s=config.memory_read_s)
        self._turns = Turns(self._leases, relay, memories, metrics, remembered_by=(self._episodes, self._notes))
        self._sessions = SessionKeeper(
            records,
            self._leases,
            SessionBlocks(directory, relay),
            metrics,
            self._limits,
            self._banks,
            default_ttl_s=config.session_ttl_s,
            default_codec=config.codec,
        )
        self._health = Health(records, directory, metrics, poll_s=config.worker_poll_s)
        self._memory = MemoryService(self._banks, self._limits)
        self._server: grpc.aio.Server | None = None
        self._http: HttpServer | None = None
        self.address = ""
        """host:port of the gRPC server, once started."""
        self.metrics_address = ""
        """host:port of the Prometheus endpoint, once started."""
        self.http_address = ""
        """host:port of the HTTP server, once started, if there is one."""

    @classmethod
    def build(cls, config: ServerConfig, workers: WorkerAddresses) -> Self:
        """Wire a front end for these workers. Nothing is connected yet.

        Raises ConfigError for files of keys that make no sense, OSError for files that can't be read, InvalidRequest
        for master keys that can't be had.
        """
        _own_tls(config).check()  # now, not when the workers are up
        keyring = load_keyring(config.master_keys)
        return cls(
            config,
            records=open_records(config.redis_url, timeout_s=config.redis_timeout_s, keyring=keyring),
            banks=open_banks(
                config.redis_url,
                timeout_s=config.redis_timeout_s,
                keyring=keyring,
                vector_sets=config.bank_vector_sets,
            ),
            directory=WorkerDirectory(
                workers,
                poll_s=config.worker_poll_s,
                silence_s=config.worker_silence_s,
                max_message_bytes=config.max_message_bytes,
                tls=_tls_to_workers(config),
            ),
            metrics=FrontMetrics(),
        )

    async def start(self) -> None:
        """Listen. Raises OSError where a port is taken. Workers and Redis may come later: health tells."""
        config = self._config
        self._server = self._make_server()
        port = listen(self._server, config.listen_host, config.port, _own_tls(config), setting="tls_cert")
        if not (self._identities.ask or config.tls_client_ca or is_loopback(config.listen_host)):
            _log.warning("anybody may call", address=config.listen_host, setting="api_keys")
        metrics_port = self.metrics.serve(config.listen_host, config.metrics_port)
        self.address = f"{config.listen_host}:{port}"
        self.metrics_address = f"{config.listen_host}:{metrics_port}"
        if config.http_port is not None:
            await self._start_http(config.http_port)
        await self.directory.start()
        await self._leases.start()
        await self._holdings.start()
        await self._health.start()
        await self._server.start()
        _log.info("listening", address=self.address, metrics=self.metrics_address, http=self.http_address)

    async def serve(self, stop: asyncio.Event) -> None:
        """Start, serve until `stop` is set, then drain and close."""
        try:
            await self.start()
            await stop.wait()
            await self.drain()
        finally:
            await self.aclose()

    async def drain(self) -> None:
        """Tell load balancers, refuse new calls, and let the running ones end within `drain_s`."""
        await self._health.say_goodbye()
        if not await self._calls.drain(self._config.drain_s):
            _log.warning("calls cut off", after_s=self._config.drain_s)
        if not await self._episodes.drain(self._config.drain_s):
            _log.warning("turns are not remembered", after_s=self._config.drain_s)

    async def aclose(self) -> None:
        """Stop at once; what still runs is cancelled. Safe to call more than once."""
        if self._server is not None:
            await self._server.stop(grace=None)
            await self._calls.drain(_UNWIND_S)  # cancelled calls still release their sessions
            self._server = None
        if self._http is not None:
            await self._http.aclose()
            self._http = None
        await self._notes.aclose()
        await self._prefilling.aclose()
        await self._episodes.aclose()
        await self._sessions.aclose()
        await self._health.aclose()
        await self._holdings.aclose()
        await self.directory.aclose()
        await self._leases.aclose()
        await self._banks.aclose()
        await self._bank_store.aclose()
        await self._records.aclose()
        self.metrics.close()

    async def _start_http(self, port: int) -> None:
        from server.http_app import HttpServer  # a fifth of a second, where it is wanted
        from server.http_memory import memory_routes

        config = self._config
        routes = memory_routes(self._memory, self._calls, self._identities, most_bytes=config.max_message_bytes)
        self._http = HttpServer(routes, _own_tls(config))
        self.http_address = f"{config.listen_host}:{await self._http.start(config.listen_host, port)}"

    def _make_server(self) -> grpc.aio.Server:
        config = self._config
        server = grpc.aio.server(
            interceptors=[self._calls],
            options=(
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", config.max_message_bytes),
                ("grpc.so_reuseport", 0),  # a second server on one port is a mistake, not a share of its calls
            ),
        )
        pb_grpc.add_InferenceServicer_to_server(InferenceService(self._turns, self._limits), server)  # type: ignore[no-untyped-call]
        pb_grpc.add_SessionsServicer_to_server(SessionsService(self._sessions), server)  # type: ignore[no-untyped-call]
        cache = CacheService(self._records, self.directory, self.metrics)
        pb_grpc.add_CacheServicer_to_server(cache, server)  # type: ignore[no-untyped-call]
        tenants = TenantsService(self._sessions, self._banks)
        pb_grpc.add_TenantsServicer_to_server(tenants, server)  # type: ignore[no-untyped-call]
        mpb_grpc.add_MemoryServicer_to_server(self._memory, server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, server)
        services = (*pb.DESCRIPTOR.services_by_name.values(), *mpb.DESCRIPTOR.services_by_name.values())
        ours = (service.full_name for service in services)
        reflection.enable_server_reflection((*ours, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return server


def _own_tls(config: ServerConfig) -> ServerTls:
    return ServerTls(config.tls_cert, config.tls_key, config.tls_client_ca)


def _tls_to_workers(config: ServerConfig) -> Tls | None:
    """What the front end shows workers is what it shows clients. Raises OSError where a file can't be read."""
    if not config.worker_tls_ca:
        return None
    tls = Tls(config.worker_tls_ca, config.tls_cert, config.tls_key, config.worker_tls_name)
    tls.credentials()  # now: later it would look as if the workers were down
    return tls
