"""What the front end counts. Touched once a call, never once a token."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from protos import rekindle_pb2 as pb
from server.metrics_endpoint import MetricsEndpoint

_TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TPOT_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

SOURCES = ("device", "host", "disk", "redis", "computed")
Tokens = dict[str, int]
"""By source."""

OTHER_TENANTS = "(others)"
_MOST_TENANTS = 200


def kind_of_turn(receipt: pb.Receipt) -> str:
    """The coldest tier that the prompt came from: "redis", "disk", "host", "hot" (device), or "new"."""
    if receipt.redis_tokens:
        return "redis"
    if receipt.disk_tokens:
        return "disk"
    if receipt.host_tokens:
        return "host"
    return "hot" if receipt.device_tokens else "new"


class FrontMetrics:
    """Each instance has a registry of its own."""

    def __init__(self, *, most_tenants: int = _MOST_TENANTS) -> None:
        """The first `most_tenants` have labels of their own, all others `OTHER_TENANTS`."""
        self.registry = CollectorRegistry()
        self._requests = self._counter("requests", "Calls ended, by gRPC code.", "method", "code")
        self._in_flight = Gauge(
            "rekindle_front_requests_in_flight", "Calls running now.", ["method"], registry=self.registry
        )
        self._ttft = self._histogram("ttft_seconds", "From a turn's arrival to its first delta.", _TTFT_BUCKETS_S)
        self._tpot = self._histogram("tpot_seconds", "Between tokens of a reply, on average.", _TPOT_BUCKETS_S)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished turns, by source.", "source")
        self._tenant_tokens = self._counter(
            "tenant_tokens", "Prompt tokens of finished turns by source, and completion tokens.", "tenant", "source"
        )
        self._most_tenants = most_tenants
        self._by_tenant: dict[str, Tokens] = {}
        self._labelled: set[str] = set()
        self._completion_tokens = self._counter("completion_tokens", "Generated tokens of finished turns.")
        self._misses = self._counter("miss_tokens", "Prompt tokens that had to be computed, by reason.", "reason")
        self._retries = self._counter("turn_retries", "Turns started again on another worker, before a first delta.")
        self._failovers = self._counter("turn_failovers", "Turns that another worker went on with in mid-reply.")
        self._prefetches = self._counter("prefetches", "Hints that a user is typing, by what came of them.", "outcome")
        self._bank_reads = self._counter("bank_reads", "Banks asked before turns, by what came of it.", "result")
        self._prefilled = self._counter(
            "prefilled_entries", "Entries of banks whose KV was to be computed ahead, by what came of it.", "result"
        )
        self._memories = self._counter("memories", "Entries of banks that were put in front of turns' inputs.")
        self._memory_seconds = Histogram(
            "rekindle_front_memory_read_seconds",
            "For which turns waited for their memories.",
            buckets=_TTFT_BUCKETS_S,
            registry=self.registry,
        )
        self._episodes = self._counter("episodes", "Turns to be remembered in banks, by what came of it.", "result")
        self._episode_seconds = Histogram(
            "rekindle_front_episode_seconds",
            "From a turn's commit to its being remembered.",
            buckets=_TTFT_BUCKETS_S,
            registry=self.registry,
        )
        self._notes = self._counter("notes", "Notes of turns that banks asked for, by what came of it.", "result")
        self._note_tokens = self._counter("note_tokens", "Tokens of prompts and replies to write notes.", "source")
        self._embeddings = self._counter("embeddings", "Calls to embed texts, by what came of it.", "kind", "result")
        self._embedded = self._counter("embedded_vectors", "Vectors made: of questions, and of texts.", "kind")
        self._embedding_seconds = self._histogram("embedding_seconds", "How long such calls took.", _TTFT_BUCKETS_S)
        self._workers = Gauge("rekindle_front_workers", "Workers known, by state.", ["state"], registry=self.registry)
        self._redis_available = Gauge(
            "rekindle_front_redis_available",
            "1 while Redis answers, so that sessions are served.",
            registry=self.registry,
        )
        self._endpoint: MetricsEndpoint | None = None

    def call_began(self, method: str) -> None:
        self._in_flight.labels(method).inc()

    def call_ended(self, method: str, code: str) -> None:
        self._in_flight.labels(method).dec()
        self._requests.labels(method, code).inc()

    def turn_finished(self, finished: pb.Finished, *, tenant: str, ttft_s: float, decode_s: float) -> None:
        """`decode_s` is the time from the first delta to the last."""
        receipt, usage = finished.receipt, finished.usage
        kind = kind_of_turn(receipt)
        self._ttft.labels(kind).observe(ttft_s)
        if usage.completion_tokens > 1:
            self._tpot.labels(kind).observe(decode_s / (usage.completion_tokens - 1))
        tokens = {source: getattr(receipt, f"{source}_tokens") for source in SOURCES}
        for source in SOURCES:
            self._prompt_tokens.labels(source).inc(tokens[source])
        self._count_for(tenant, tokens, usage.completion_tokens)
        for miss in receipt.misses:
            name = pb.MissReason.Name(miss.reason).removeprefix("MISS_REASON_").lower()
            self._misses.labels(name).inc(miss.tokens)
        self._completion_tokens.inc(usage.completion_tokens)

    def prompt_tokens_of(self, tenant: str) -> Tokens:
        """By source, of the tenant's turns that have finished on this front end."""
        return self._by_tenant.get(tenant) or dict.fromkeys(SOURCES, 0)

    def turn_retried(self) -> None:
        self._retries.inc()

    def turn_failed_over(self) -> None:
        self._failovers.inc()

    def prefetched(self, outcome: str) -> None:
        """restored, hot (nothing was missing), joined (one was running), refused (too many were) or failed."""
        self._prefetches.labels(outcome).inc()

    def bank_read(self, result: str) -> None:
        """read, or empty (it had nothing)."""
        self._bank_reads.labels(result).inc()

    def prefilled(self, result: str, entries: int) -> None:
        """kept, not_kept (too short or long, or Redis has no room), failed, gone (its bank) or full (too many wait)."""
        self._prefilled.labels(result).inc(entries)

    def bank_missed(self, reason: pb.BankMissReason) -> None:
        """tokens, late, stale (its vectors are of another embedder) or failed."""
        self.bank_read(pb.BankMissReason.Name(reason).removeprefix("BANK_MISS_REASON_").lower())

    def memories_read(self, entries: int, *, seconds: float) -> None:
        """A turn has this many in its input, and waited so long for them."""
        self._memories.inc(entries)
        self._memory_seconds.observe(seconds)

    def episode_written(self, result: str, seconds: float) -> None:
        """written, empty (the user said nothing), failed or full (too many waited)."""
        self._episodes.labels(result).inc()
        if result == "written":
            self._episode_seconds.observe(seconds)

    def note_written(self, result: str) -> None:
        """written, empty (there was nothing to keep), busy (no worker had time), full (too many waited) or failed."""
        self._notes.labels(result).inc()

    def note_asked(self, usage: pb.Usage) -> None:
        """What it cost that a model wrote one."""
        self._note_tokens.labels("prompt").inc(usage.prompt_tokens)
        self._note_tokens.labels("completion").inc(usage.completion_tokens)

    def embedding_ended(self, kind: str, result: str, *, vectors: int, seconds: float) -> None:
        """Of a question or of texts; done, failed or cancelled (who asked waits no longer)."""
        self._embeddings.labels(kind, result).inc()
        self._embedded.labels(kind).inc(vectors)
        if result == "done":
            self._embedding_seconds.labels(kind).observe(seconds)

    def workers_seen(self, *, accepting: int, draining: int, down: int) -> None:
        self._workers.labels("accepting").set(accepting)
        self._workers.labels("draining").set(draining)
        self._workers.labels("down").set(down)

    def redis_seen(self, available: bool) -> None:
        self._redis_available.set(available)

    def serve(self, host: str, port: int) -> int:
        """Answer HTTP on a thread until `close`; return the port. Raises OSError where it is taken."""
        self._endpoint = MetricsEndpoint(self.registry, host, port)
        return self._endpoint.port

    def close(self) -> None:
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None

    def _count_for(self, tenant: str, tokens: Tokens, completion_tokens: int) -> None:
        is_new = tenant not in self._by_tenant
        counted = self._by_tenant.setdefault(tenant, dict.fromkeys(SOURCES, 0))
        for source in SOURCES:
            counted[source] += tokens[source]
        if is_new and len(self._by_tenant) <= self._most_tenants:
            self._labelled.add(tenant)
        label = tenant if tenant in self._labelled else OTHER_TENANTS
        for source, number in (*tokens.items(), ("completion", completion_tokens)):
            self._tenant_tokens.labels(label, source).inc(number)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"rekindle_front_{name}_total", what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"rekindle_front_{name}", what, ["kind"], buckets=buckets, registry=self.registry)
