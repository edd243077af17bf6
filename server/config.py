"""Settings of the front end: frozen, complete, checked once when built. Light: shown by `--help`."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from cache_store.codecs import RAW, SESSION_CODECS
from cache_store.master_keys import SOURCE, is_source

LogFormat = Literal["auto", "console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


class ConfigError(ValueError):
    """A setting, or a pair of settings, cannot work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where the front end listens, where it keeps sessions, and how patient it is."""

    listen_host: str = "127.0.0.1"
    """The address that the gRPC and metrics servers bind to."""

    port: int = 50051
    """Port of the gRPC server; 0 takes a free one."""

    metrics_port: int = 9464
    """Port of the Prometheus endpoint; 0 takes a free one."""

    http_port: int | None = None
    """Port of the HTTP server, which has banks of knowledge as JSON; 0 takes a free one. Without it there is none."""

    tls_cert: str = ""
    """PEM file with the certificate (and its chain) that clients are shown; a renewed one is taken up without a
    restart. Empty: plain text."""

    tls_key: str = ""
    """PEM file with the certificate's private key."""

    tls_client_ca: str = ""
    """PEM file with the authorities that clients' certificates must come from (mutual TLS); empty asks for none."""

    worker_tls_ca: str = ""
    """PEM file with the authorities that workers' certificates must come from: workers are then reached by TLS, and
    shown tls_cert where they ask. Empty: plain text."""

    worker_tls_name: str = ""
    """The name in the workers' certificates; empty: the address that they are reached by."""

    api_keys: str = ""
    """TOML file with the hashes of API keys, each with its tenant, and with tenants' limits; `rekindle keys new` writes
    it, and changes are taken up as they come. Without it and jwt_keys, calls need no key."""

    jwt_keys: str = ""
    """PEM file with the public key, or JWKS, of who signs JSON Web Tokens: RS256, ES256 or HS256."""

    jwt_audience: str = ""
    jwt_issuer: str = ""
    """What a token must name as its audience and its issuer; needed with jwt_keys."""

    jwt_tenant_claim: str = "tenant"
    """The claim that names a token's tenant."""

    tenant_max_sessions: int = 0
    """How many sessions a tenant may keep, where api_keys doesn't say; 0: any number."""

    tenant_max_tokens: int = 0
    """How many tokens (of 4 bytes) a tenant's sessions may have together, where api_keys doesn't say; 0: any number."""

    tenant_max_turns: int = 0
    """How many turns of a tenant may run at once on this front end, where api_keys doesn't say; 0: any number."""

    tenant_max_banks: int = 0
    """How many banks a tenant may have, where api_keys doesn't say; 0: any number."""

    bank_max_entries: int = 1_000_000
    """How many entries a bank may have."""

    bank_index_bytes: int = 2 << 30
    """Memory for what is searched of banks. Beyond it, what was searched longest ago is dropped and read again when it
    is needed; a larger bank is kept alone. 100,000 entries take some 250 MiB."""

    bank_vector_sets: bool = False
    """Let Redis itself find what is near in large banks, where it can (Redis 8; not with master_keys). Otherwise front
    ends do. Of banks made from then on. Each entry then takes Redis some 1 to 2 ms to keep."""

    memory_read_s: float = 2.0
    """How long a turn waits for what its session's banks know; what comes later is left out."""

    redis_url: str = field(default="redis://127.0.0.1:6379", repr=False)  # it may have a password
    """redis://, rediss:// or unix:// for the server that keeps sessions; redis+cluster:// or rediss+cluster:// for a
    Redis Cluster; redis+sentinel://host:port/service (rediss+sentinel:// with TLS; sentinel_username and
    sentinel_password as options) for whatever Sentinel says; memory:// (or nothing) keeps them in this process, for
    tests."""

    master_keys: str = ""
    """Where the keys are read from that seal conversations and KV in Redis and on disk, on each machine: file:PATH,
    env:NAME (a variable of the environment) or command:COMMAND (its output). See docs/encryption.md; empty seals
    nothing."""

    redis_timeout_s: float = 2.0
    """How long one read or write of Redis may stall before it counts as failed."""

    session_ttl_s: int = 0
    """Seconds without use after which a session goes, where its creator doesn't say; 0: never."""

    block_ttl_s: int = 86_400
    """Seconds without use after which Redis drops KV blocks (they can be computed again). A session that is to live
    longer keeps its blocks as long; a pinned one for ever."""

    codec: str = RAW.name
    """How KV is kept in host memory and Redis, where a session's creator doesn't say: raw or lossless (bit for bit),
    int8, k8v4 or int4 (smaller, nearly the same), or ladder (smaller the colder it gets: see --codec-ladder)."""

    lease_s: float = 30.0
    """How long a session stays locked after its front end has died in mid-turn."""

    failover_wait_s: float = 60.0
    """How long a turn that has lost its worker waits for another one to come up, where its call has no deadline."""

    flush_timeout_s: float = 1.0
    """How long a turn that moves to another worker waits for the blocks that the last one still has in hand."""

    worker_poll_s: float = 1.0
    """How often workers are asked whether they live."""

    worker_silence_s: float = 10.0
    """How long a worker may be silent, frozen or behind a network that is gone, before its turns go to another one."""

    drain_s: float = 30.0
    """How long running turns may go on after SIGTERM."""

    max_streams: int = 4096
    """Streams of replies that may be open at once; more are refused, to be tried again elsewhere or later."""

    max_message_bytes: int = 64 << 20
    """The largest request or response: a session of a million tokens has 4 MiB."""

    log_format: LogFormat = "auto"
    """json, console (for people), or auto: console on a terminal, else json."""

    log_level: LogLevel = "info"
    """The least that is logged."""

    def __post_init__(self) -> None:
        ports = {name: getattr(self, name) or 0 for name in ("port", "metrics_port", "http_port")}
        for name, port in ports.items():
            if not 0 <= port <= 65_535:
                raise ConfigError(f"{name} must be from 0 to 65535, got {port}")
            other = next(other for other, taken in ports.items() if taken == port)
            if port and other != name:
                raise ConfigError(f"{other} and {name} must differ, both are {port}")
        for name in (
            "bank_max_entries",
            "bank_index_bytes",
            "memory_read_s",
            "redis_timeout_s",
            "lease_s",
            "worker_poll_s",
            "worker_silence_s",
            "max_streams",
            "max_message_bytes",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in (
            "tenant_max_sessions",
            "tenant_max_tokens",
            "tenant_max_turns",
            "tenant_max_banks",
            "session_ttl_s",
            "block_ttl_s",
            "failover_wait_s",
            "flush_timeout_s",
            "drain_s",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError(f"tls_cert and tls_key go together, got {self.tls_cert!r} and {self.tls_key!r}")
        for name, needed in (
            ("tls_client_ca", "tls_cert"),
            ("worker_tls_name", "worker_tls_ca"),
            ("jwt_keys", "jwt_audience"),
            ("jwt_keys", "jwt_issuer"),
        ):
            if getattr(self, name) and not getattr(self, needed):
                raise ConfigError(f"{name} needs {needed}")
        if self.master_keys and not is_source(self.master_keys):  # not shown: it may be a key
            raise ConfigError(f"master_keys must be {SOURCE}")
        if self.codec not in SESSION_CODECS:
            raise ConfigError(f"codec must be one of {', '.join(SESSION_CODECS)}, got {self.codec!r}")
        if self.log_format not in get_args(LogFormat):
            raise ConfigError(f"log_format must be one of {get_args(LogFormat)}, got {self.log_format!r}")
        if self.log_level not in get_args(LogLevel):
            raise ConfigError(f"log_level must be one of {get_args(LogLevel)}, got {self.log_level!r}")
        if self.lease_s < 3 * self.redis_timeout_s:
            raise ConfigError(
                "lease_s must be at least 3 times redis_timeout_s (or one stall loses a running turn), "
                f"got {self.lease_s} and {self.redis_timeout_s}"
            )
