"""Settings of a worker: frozen, complete, checked once when built. Light: sent to Ray actors, shown by `--help`."""

from dataclasses import dataclass, field

from cache_store.ladder import parse_ladder
from cache_store.layout import MAX_BLOCK_TOKENS, MIN_BLOCK_TOKENS
from cache_store.master_keys import SOURCE, is_source

AUTO = "auto"
"""As `host_cache_dir`: whoever starts the worker chooses."""


def parse_weights(text: str) -> dict[str, float]:
    """Read "acme=4,trial=0.5": weights by tenant. Raises ValueError with what is wrong."""
    weights: dict[str, float] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        tenant, _, weight = part.rpartition("=")
        if not tenant or tenant in weights:
            raise ValueError(f"needs TENANT=WEIGHT, each tenant once, got {part!r}")
        weights[tenant] = float(weight)
        if not 0 < weights[tenant] < float("inf"):
            raise ValueError(f"a weight must be above 0, got {part!r}")
    return weights


class ConfigError(ValueError):
    """A setting, or a pair of settings, cannot work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """What one worker runs and how much room it has."""

    model: str = "rekindle-recall"
    """rekindle-recall (which comes along), a directory or hub id that transformers can load, or preset:NAME for a shape
    with random weights."""

    embedder: str = ""
    """The model that turns texts of memory banks into vectors: a directory or hub id of a sentence-embedding model,
    none, or empty for all-MiniLM-L6-v2 (which comes along). It is loaded when it is first asked."""

    dtype: str = "auto"
    """float32, bfloat16, float16, or auto: as the checkpoint says."""

    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""

    block_tokens: int = 0
    """Tokens in a KV block, a power of two from 16 to 256; 0 chooses so that a block is at most 2 MiB."""

    device_cache_bytes: int = 0
    """KV kept on the device; 0 takes 90% of what the model leaves free on CUDA, and 1 GiB on CPU."""

    host_cache_bytes: int = 1 << 30
    """KV kept in host memory, below the device."""

    host_cache_dir: str = "auto"
    """Where the host cache lies as files that outlive a worker, so that the next one on this machine starts warm: a
    directory in memory, such as /dev/shm/rekindle, whose files you delete when you want them gone. auto: one under
    /dev/shm that `rekindle serve` removes when it ends (private memory on a running Ray cluster, for a worker started
    by itself, and with master_keys: what is in the directory is not sealed); empty: private memory of the worker."""

    disk_dir: str = ""
    """A directory on a fast local disk for KV below host memory, found again by the next worker; needs disk_bytes."""

    disk_bytes: int = 0
    """KV that each worker keeps in disk_dir at most; 0: none."""

    redis_url: str = field(default="redis://127.0.0.1:6379", repr=False)  # it may have a password
    """redis://, rediss:// or unix:// for the shared tier; redis+cluster:// or rediss+cluster:// for a Redis Cluster;
    redis+sentinel://host:port/service (rediss+sentinel:// with TLS; sentinel_username and sentinel_password as
    options) for whatever Sentinel says; memory:// keeps it in the worker (for tests); empty does without."""

    master_keys: str = ""
    """Where the keys are read from that seal conversations and KV in Redis and on disk, on each machine: file:PATH,
    env:NAME (a variable of the environment) or command:COMMAND (its output). See docs/encryption.md; empty seals
    nothing."""

    redis_timeout_s: float = 2.0
    """How long one read or write of Redis may stall before it counts as failed."""

    restore_timeout_s: float = 10.0
    """How long a turn waits for its blocks before it computes what is missing."""

    restore_plan: str = "auto"
    """How missing KV is had: load (wait for it), compute (never wait), or auto: whatever is expected to be faster, or
    both at once, by what this worker has measured of itself."""

    self_measure_s: float = 1.0
    """How long a worker may measure itself before it starts, for restore_plan auto; 0 learns from requests alone."""

    store_queue_bytes: int = 256 << 20
    """Blocks waiting to be written to Redis; what comes on top is dropped (and counted)."""

    block_ttl_s: int = 86_400
    """How long Redis keeps a block that nobody uses, in seconds; each use begins that time anew. 0: for ever."""

    codec_ladder: str = "lossless,int8@600,int4@3600"
    """Codecs of sessions whose codec is ladder: the first when a block leaves the device, each next one after this many
    seconds (@SECONDS) in which nobody read it from Redis."""

    audit_rate: float = 0.0
    """Share of the turns on restored KV, 0 to 1, that are computed again from their tokens and compared. What differs
    by more than its codec may is counted, logged and deleted."""

    context_tokens: int = 0
    """Positions that sessions with the context policies WINDOW and RECALL use at most; 0: all that the model has."""

    recall_tokens: int = 0
    """How many of them are for what is recalled; 0: a quarter."""

    representative_bytes: int = 512 << 20
    """Host memory for what tells what may be worth recalling: a small part of the keys of each block that has left its
    session's window."""

    max_step_tokens: int = 512
    """Tokens run through the model in one step: decoding sequences first, then chunks of prompts."""

    max_prefill_tokens: int = 2048
    """Tokens of prompts in one step while nothing decodes: with nobody to keep waiting, larger steps are faster."""

    max_running: int = 64
    """Requests in the batch at once."""

    max_waiting: int = 256
    """Requests that may queue behind them; more are refused."""

    max_waiting_tokens: int = 1 << 20
    """Tokens that the prompts of those that queue may have together; a single one may have more."""

    tenant_weights: str = ""
    """Shares of tenants that compete, such as acme=4,trial=0.5: tokens of prompts and replies are shared out in this
    proportion. Who is not named has weight 1."""

    cpu_threads: int = 0
    """Threads of torch's CPU kernels; 0 leaves torch's own choice."""

    preset_seed: int = 0
    """Seed of the random weights of a preset: equal seeds, equal weights."""

    listen_host: str = "127.0.0.1"
    """The address that the worker's gRPC and metrics servers bind to, and that front ends reach."""

    tls_cert: str = ""
    """PEM file with the certificate (and its chain) that front ends are shown; a renewed one is taken up without a
    restart. Empty: plain text."""

    tls_key: str = ""
    """PEM file with the certificate's private key."""

    tls_client_ca: str = ""
    """PEM file with the authorities that front ends' certificates must come from (mutual TLS); empty asks for none."""

    metrics_port: int = 0
    """Port of the worker's Prometheus endpoint; 0 takes a free one."""

    show_progress: bool = False
    """Show progress bars while weights load."""

    def __post_init__(self) -> None:
        if self.block_tokens and (
            not MIN_BLOCK_TOKENS <= self.block_tokens <= MAX_BLOCK_TOKENS or self.block_tokens & (self.block_tokens - 1)
        ):
            raise ConfigError(
                f"block_tokens must be 0 or a power of two from {MIN_BLOCK_TOKENS} to {MAX_BLOCK_TOKENS}, "
                f"got {self.block_tokens}"
            )
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device must be auto, cpu or cuda, got {self.device!r}")
        if self.restore_plan not in ("auto", "load", "compute"):
            raise ConfigError(f"restore_plan must be auto, load or compute, got {self.restore_plan!r}")
        for name in ("max_step_tokens", "max_running", "redis_timeout_s", "restore_timeout_s", "store_queue_bytes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in (
            "device_cache_bytes",
            "host_cache_bytes",
            "disk_bytes",
            "max_waiting",
            "max_waiting_tokens",
            "cpu_threads",
            "metrics_port",
            "block_ttl_s",
            "self_measure_s",
            "context_tokens",
            "recall_tokens",
            "representative_bytes",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if bool(self.disk_dir) != bool(self.disk_bytes):
            raise ConfigError(
                f"disk_dir and disk_bytes go together, got disk_dir={self.disk_dir!r} and disk_bytes={self.disk_bytes}"
            )
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError(f"tls_cert and tls_key go together, got {self.tls_cert!r} and {self.tls_key!r}")
        if self.tls_client_ca and not self.tls_cert:
            raise ConfigError("tls_client_ca needs tls_cert")
        if self.master_keys and not is_source(self.master_keys):  # not shown: it may be a key
            raise ConfigError(f"master_keys must be {SOURCE}")
        for name, parse in (("codec_ladder", parse_ladder), ("tenant_weights", parse_weights)):
            try:
                parse(getattr(self, name))
            except ValueError as error:
                raise ConfigError(f"{name}: {error}") from error
        if not 0.0 <= self.audit_rate <= 1.0:
            raise ConfigError(f"audit_rate must be from 0 to 1, got {self.audit_rate}")
        if self.max_prefill_tokens < self.max_step_tokens:
            raise ConfigError(
                "max_prefill_tokens must be at least max_step_tokens, "
                f"got {self.max_prefill_tokens} and {self.max_step_tokens}"
            )
        if self.max_step_tokens < self.max_running:
            raise ConfigError(
                "max_step_tokens must be at least max_running (each decodes one token a step), "
                f"got {self.max_step_tokens} and {self.max_running}"
            )
