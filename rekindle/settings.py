"""All settings of `rekindle serve`: one typed object, and each setting as the command line shows it.

A setting is described once, in the docstring under its field. Knows neither gRPC nor Ray nor cyclopts.
"""

import ast
import inspect
import os
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, get_type_hints

from server.config import ServerConfig
from worker.config import ConfigError, WorkerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemConfig:
    """What the system consists of besides a front end: workers on Ray, and perhaps a Redis of its own."""

    num_workers: int = 1
    """Workers to start. Each is a Ray actor with a whole copy of the model."""

    min_workers: int = 1
    max_workers: int = 0
    """Between how many workers the load decides; a max_workers of 0 leaves it to num_workers and `rekindle scale`."""

    scale_up_after_s: float = 10.0
    """How long requests must have queued, or the workers' pools have been full, before there are more workers."""

    scale_down_after_s: float = 300.0
    """How long one worker fewer must have been enough before one is drained."""

    gpus_per_worker: float = 0.0
    """GPUs that Ray reserves for a worker; 0 runs it on the CPU."""

    cpus_per_worker: float = 0.0
    """CPU cores that Ray reserves for a worker, and so the threads it computes with; 0 shares this machine's cores
    among the workers (on a running cluster: 1)."""

    ray_address: str = ""
    """A running Ray cluster: HOST:PORT, ray://HOST:PORT or auto; empty starts a local one that ends with the server.
    For HOST:PORT of a cluster that asks for a token, set RAY_AUTH_MODE=token in the environment."""

    embedded_redis: bool = False
    """Start a Redis server of its own, on loopback and in memory, that ends with the server: conversations too.
    --redis-url is then ignored."""

    @property
    def reserved_cpus(self) -> float:
        """`cpus_per_worker`, or what it stands for where it is 0."""
        if self.cpus_per_worker or self.ray_address:
            return self.cpus_per_worker or 1.0
        return float(max(1, (os.cpu_count() or 1) // self.num_workers))

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ConfigError(f"num_workers must be at least 1, got {self.num_workers}")
        if self.max_workers and not 1 <= self.min_workers <= self.num_workers <= self.max_workers:
            raise ConfigError(
                "need 1 <= min_workers <= num_workers <= max_workers, "
                f"got {self.min_workers}, {self.num_workers} and {self.max_workers}"
            )
        for name in ("gpus_per_worker", "cpus_per_worker", "scale_up_after_s", "scale_down_after_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting: the flag --NAME, the TOML key NAME, the environment's REKINDLE_NAME."""

    name: str
    kind: Any
    default: Any
    help: str
    group: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that `rekindle serve` can be told."""

    server: ServerConfig
    worker: WorkerConfig
    system: SystemConfig

    def __post_init__(self) -> None:
        if bool(self.worker.tls_cert) != bool(self.server.worker_tls_ca):
            raise ConfigError(
                "worker_tls_cert and worker_tls_ca go together (what workers show, and what the front end believes), "
                f"got {self.worker.tls_cert!r} and {self.server.worker_tls_ca!r}"
            )
        if self.worker.tls_client_ca and not self.server.tls_cert:
            raise ConfigError("worker_tls_client_ca needs tls_cert, which the front end shows its workers")

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Build from values by setting name; what is not named keeps its default. Raises ValueError (ConfigError)."""
        return cls(
            **{
                part: config(**{field: values[name] for field, name in _names(config).items() if name in values})
                for part, config in _PARTS.items()
            }
        )


_PARTS: dict[str, type] = {"server": ServerConfig, "worker": WorkerConfig, "system": SystemConfig}

_SHARED = frozenset({"redis_url", "redis_timeout_s", "block_ttl_s", "master_keys"})
"""One value for front end and workers. Other names that both have are two settings, the worker's with a prefix."""

_GROUPS = {
    "Front end": (),
    "Model": ("model", "embedder", "dtype", "device", "cpu_threads", "preset_seed", "show_progress"),
    "Memory": (
        "block_tokens",
        "device_cache_bytes",
        "host_cache_bytes",
        "host_cache_dir",
        "disk_dir",
        "disk_bytes",
        "codec",
        "codec_ladder",
        "audit_rate",
    ),
    "Redis": (
        "redis_url",
        "redis_timeout_s",
        "block_ttl_s",
        "restore_timeout_s",
        "store_queue_bytes",
        "embedded_redis",
    ),
    "Security": (
        "tls_cert",
        "tls_key",
        "tls_client_ca",
        "worker_tls_ca",
        "worker_tls_name",
        "api_keys",
        "jwt_keys",
        "jwt_audience",
        "jwt_issuer",
        "jwt_tenant_claim",
        "tenant_max_sessions",
        "tenant_max_tokens",
        "tenant_max_turns",
        "tenant_max_banks",
        "master_keys",
    ),
    "Banks": ("bank_max_entries", "bank_index_bytes", "bank_vector_sets", "memory_read_s"),
    "Batching": (
        "max_step_tokens",
        "max_prefill_tokens",
        "max_running",
        "max_waiting",
        "max_waiting_tokens",
        "tenant_weights",
    ),
    "Workers and Ray": (),
}
_GROUP_OF_THE_REST = {ServerConfig: "Front end", WorkerConfig: "Workers and Ray", SystemConfig: "Workers and Ray"}


def all_settings() -> Iterator[Setting]:
    """Every setting once, by group."""
    settings = {setting.name: setting for config in _PARTS.values() for setting in _settings_of(config)}
    yield from sorted(settings.values(), key=lambda setting: list(_GROUPS).index(setting.group))


def _settings_of(config: type) -> Iterator[Setting]:
    names, kinds, helps = _names(config), get_type_hints(config), field_docs(config)
    for field in fields(config):
        group = next((group for group, members in _GROUPS.items() if field.name in members), _GROUP_OF_THE_REST[config])
        yield Setting(
            name=names[field.name],
            kind=kinds[field.name],
            default=field.default,
            help=helps[field.name],
            group=group,
        )


def _names(config: type) -> dict[str, str]:
    """Field to setting name."""
    taken = {field.name for field in fields(ServerConfig)} - _SHARED if config is WorkerConfig else set()
    return {field.name: f"worker_{field.name}" if field.name in taken else field.name for field in fields(config)}


def field_docs(config: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, on one line. One docstring serves all fields right above it."""
    docs: dict[str, str] = {}
    undocumented: list[str] = []
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(definition, ast.ClassDef)
    for statement in definition.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name)):
                undocumented.append(name)
            case ast.Expr(value=ast.Constant(value=str(text))):
                docs |= dict.fromkeys(undocumented, " ".join(text.split()))
                undocumented.clear()
    return docs
