"""What the worker counts, and the HTTP endpoint that shows it. The engine's figures are read when scraped."""

from collections.abc import Callable, Iterator, Sequence
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from worker.calls import Receipt
from worker.figures import AgeingStats, EngineStats, Moved

_LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TPOT_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


def kind_of_turn(receipt: Receipt) -> str:
    """The coldest tier that the prompt came from: "redis", "disk", "host", "hot" (device), or "new"."""
    if receipt.redis_tokens:
        return "redis"
    if receipt.disk_tokens:
        return "disk"
    if receipt.host_tokens:
        return "host"
    return "hot" if receipt.device_tokens else "new"


class WorkerMetrics:
    """Each instance has a registry of its own."""

    def __init__(self, read: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(read))
        self._ttft = self._histogram("ttft", "From a request's arrival to its first token.", _LATENCY_BUCKETS_S)
        self._tpot = self._histogram("tpot", "Between tokens of a reply, on average.", _TPOT_BUCKETS_S)
        self._queue = self._histogram("queue", "From a request's arrival to its admission.", _LATENCY_BUCKETS_S)
        self._restore = self._histogram("restore", "Bringing a prompt's blocks back.", _LATENCY_BUCKETS_S)
        self._prefill = self._histogram("prefill", "Computing what was missing of a prompt.", _LATENCY_BUCKETS_S)
        self._planned = Counter(
            "rekindle_planned_seconds_total",
            "To the first token of turns whose restore was planned, as predicted.",
            ["kind"],
            registry=self.registry,
        )
        self._planned_took = Counter(
            "rekindle_planned_actual_seconds_total", "The same, as it was.", ["kind"], registry=self.registry
        )
        self._restored_bytes = Counter(
            "rekindle_restored_bytes_total", "Bytes of KV brought back for turns.", registry=self.registry
        )
        self._server: WSGIServer | None = None
        self._thread: Thread | None = None

    def turn_finished(self, receipt: Receipt, completion_tokens: int) -> None:
        kind = kind_of_turn(receipt)
        self._ttft.labels(kind).observe(receipt.ttft_ms / 1e3)
        self._queue.labels(kind).observe(receipt.queue_ms / 1e3)
        self._restore.labels(kind).observe(receipt.restore_ms / 1e3)
        self._prefill.labels(kind).observe(receipt.prefill_ms / 1e3)
        self._restored_bytes.inc(receipt.restored_bytes)
        if receipt.plan is not None:
            plan = receipt.plan.kind.name.lower()
            self._planned.labels(plan).inc(receipt.plan.predicted_ms / 1e3)
            self._planned_took.labels(plan).inc(receipt.plan.actual_ms / 1e3)
        if completion_tokens > 1:
            self._tpot.labels(kind).observe(receipt.decode_ms / 1e3 / (completion_tokens - 1))

    def serve(self, host: str, port: int) -> int:
        """Answer HTTP on a thread until `close`; return the port. Raises OSError where it is taken."""
        self._server, self._thread = start_http_server(port, addr=host, registry=self.registry)
        return self._server.server_port

    def close(self) -> None:
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = self._thread = None

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"rekindle_{name}_seconds", what, ["kind"], buckets=buckets, registry=self.registry)


class _EngineCollector(Collector):
    """One reading of the engine for each scrape, so that the figures of a scrape belong together."""

    def __init__(self, read: Callable[[], EngineStats]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        stats = self._read()
        yield _counter(
            "prompt_tokens",
            "Prompt tokens of turns, by where their KV came from.",
            "source",
            {
                "device": stats.device_tokens,
                "host": stats.host_tokens,
                "disk": stats.disk_tokens,
                "redis": stats.redis_tokens,
                "computed": stats.computed_tokens,
            },
        )
        yield _gauge(
            "device_blocks",
            "KV blocks on the device.",
            "state",
            stats.device_blocks,
        )
        yield _gauge(
            "host_blocks",
            "KV blocks in host memory.",
            "state",
            {"held": stats.host.blocks, "free": stats.host.capacity_blocks - stats.host.blocks},
        )
        yield _gauge(
            "cache_bytes",
            "Bytes of KV held.",
            "tier",
            {"device": stats.device.bytes, "host": stats.host.bytes, "disk": stats.disk.bytes},
        )
        yield _counter(
            "local_faults", "Blocks that host memory or disk lost or did not take.", "kind", stats.local_faults
        )
        yield _gauge("queue_requests", "Requests now.", "state", {"running": stats.running, "waiting": stats.waiting})
        yield GaugeMetricFamily(
            "rekindle_queue_tokens", "Tokens of the prompts of requests that wait.", value=stats.waiting_tokens
        )
        yield _counter("turned_away_requests", "Requests refused or dropped.", "reason", stats.turned_away)
        yield _counter("audits", "Audits of turns on restored KV.", "result", stats.audits)
        yield from _moves(stats.moved)
        yield from _ageing(stats.ageing)
        if stats.store_available is not None:
            yield GaugeMetricFamily(
                "rekindle_redis_available",
                "1 while Redis is asked for blocks; 0 while it has failed and is only probed.",
                value=stats.store_available,
            )
        yield CounterMetricFamily(
            "rekindle_prefill_saved_seconds",
            "Prefill that the tiers have spared the device.",
            value=stats.prefill_s_saved,
        )
        yield CounterMetricFamily(
            "rekindle_stores_dropped", "Blocks not written to Redis for want of room.", value=stats.stores_dropped
        )
        yield CounterMetricFamily(
            "rekindle_evicted_then_needed", "Blocks evicted and asked for later.", value=stats.evicted_then_needed
        )


def _moves(all_moved: Sequence[Moved]) -> Iterator[Metric]:
    for name, what in (
        ("bytes", "Bytes of KV moved between tiers, as payloads."),
        ("raw_bytes", "What these payloads are on a device: more, by what the codec saves."),
        ("seconds", "Seconds spent moving KV between tiers, coding included."),
    ):
        family = CounterMetricFamily(f"rekindle_moved_{name}", what, labels=["source", "target", "codec"])
        for moved in all_moved:
            family.add_metric([moved.source, moved.target, moved.codec], getattr(moved, name))
        yield family


def _ageing(stats: AgeingStats) -> Iterator[Metric]:
    blocks = CounterMetricFamily(
        "rekindle_aged_blocks", "Blocks that went to a smaller codec in Redis.", labels=["source", "target"]
    )
    saved = CounterMetricFamily(
        "rekindle_aged_saved_bytes", "Bytes of Redis that this has saved.", labels=["source", "target"]
    )
    for aged in stats.aged:
        blocks.add_metric([aged.source, aged.target], aged.blocks)
        saved.add_metric([aged.source, aged.target], aged.saved_bytes)
    yield from (blocks, saved)
    yield GaugeMetricFamily(
        "rekindle_ageing_held_back",
        "1 while Redis does not let blocks age (the log says why).",
        value=bool(stats.held_back),
    )


def _counter(name: str, what: str, label: str, values: dict[str, int]) -> Metric:
    family = CounterMetricFamily(f"rekindle_{name}", what, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _gauge(name: str, what: str, label: str, values: dict[str, int]) -> Metric:
    family = GaugeMetricFamily(f"rekindle_{name}", what, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
