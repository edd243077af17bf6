"""One replay: a fresh deployment with tiers of given sizes, a trace through it, and what the best cache would have hit.

The prompts belong to no session: they are sent whole, as tokens, and the prefix cache finds what was seen before. So
what can be reused is what the trace says, to the block, and two servers get the same work, whatever they reply.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import NamedTuple

from transformers import AutoConfig, PreTrainedConfig

from benchmarks.deployment import deployment, free_port
from benchmarks.replay_drive import Below, Served, Work, below_the_turns, replay, warm_up
from benchmarks.replay_ideal import Access, Ideal, access, distinct_blocks, ideal
from benchmarks.trace import Request, TokenSource, TraceError
from cache_store.embedded_redis import RedisServer
from cache_store.layout import KVLayout, choose_block_tokens
from worker.model.presets import PREFIX, preset_config
from worker.model.shipped import locate

_DEVICE_SHARE = 0.1
_HOST_SHARE = 0.3
_REDIS_SHARE = 2.0
"""Redis needs more than the blocks' bytes: its allocator rounds a block of 1.75 MiB up to 2 MiB."""
_LEAST_REDIS_BYTES = 64 << 20
"""An empty one has some MB already."""


class Shape(NamedTuple):
    """What must be known of a model to lay out a replay."""

    layout: KVLayout
    vocab_size: int
    max_context_tokens: int


class Sizes(NamedTuple):
    """Bytes of each tier; 0 is none."""

    device: int
    host: int
    redis: int
    disk: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests, by time, with their prompts and the blocks these consist of."""

    work: Work
    accesses: Sequence[Access]
    shape: Shape

    def sizes(
        self, *, device: int | None = None, host: int | None = None, redis: int | None = None, disk: int = 0
    ) -> Sizes:
        """What is None becomes a share of all that the prompts bring: 0.1 of it on the device (so sessions have ten
        times the device's room), 0.3 in host memory, and Redis has room for all. Any one request fits the device."""
        block_bytes = self.shape.layout.block_bytes
        total = distinct_blocks(self.accesses) * block_bytes
        largest = max(len(one.names) + one.num_own for one in self.accesses) * block_bytes
        return Sizes(
            max(int(total * _DEVICE_SHARE), largest) if device is None else device,
            int(total * _HOST_SHARE) if host is None else host,
            max(int(total * _REDIS_SHARE), _LEAST_REDIS_BYTES) if redis is None else redis,
            disk,
        )

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for _, prompt in self.work)

    def ideal(self, sizes: Sizes) -> Ideal:
        layout = self.shape.layout
        return ideal(
            self.accesses,
            prompt_tokens=self.prompt_tokens,
            block_tokens=layout.block_tokens,
            capacity_blocks=sum(size // layout.block_bytes for size in sizes),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A replay that has ended."""

    sizes: Sizes
    served: Sequence[Served]
    below: Below
    ideal: Ideal


def shape_of(model: str) -> Shape:
    """From the model's config alone: no weights are loaded."""
    config = (
        preset_config(model.removeprefix(PREFIX))
        if model.startswith(PREFIX)
        else AutoConfig.from_pretrained(locate(model))
    ).get_text_config()
    token = _layout(config, block_tokens=1)
    return Shape(
        _layout(config, block_tokens=choose_block_tokens(token.token_bytes)),
        config.vocab_size,
        config.max_position_embeddings,
    )


def _layout(config: PreTrainedConfig, block_tokens: int) -> KVLayout:
    return KVLayout(
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        block_tokens=block_tokens,
        dtype=str(config.dtype).removeprefix("torch."),
    )


def load_of(requests: Sequence[Request], shape: Shape) -> Load:
    """Make the prompts. Raises TraceError for one that does not fit the model with its reply."""
    tokens = TokenSource(shape.vocab_size)
    for request in requests:
        if request.prompt_tokens + request.output_tokens > shape.max_context_tokens:
            raise TraceError(
                f"a prompt of {request.prompt_tokens} tokens and a reply of {request.output_tokens} don't fit the "
                f"model's {shape.max_context_tokens}: scale the lengths down"
            )
    work = [(request, tokens.prompt(request)) for request in requests]
    block_tokens = shape.layout.block_tokens
    accesses = [access(prompt, request.output_tokens, block_tokens) for request, prompt in work]
    return Load(work=work, accesses=accesses, shape=shape)


class Deployed(NamedTuple):
    address: str
    metrics_port: int


Deploy = Callable[[Sizes], AbstractContextManager[Deployed]]
"""Serves from tiers of given sizes, as long as it is entered."""


@contextmanager
def deployed(model: str, shape: Shape, sizes: Sizes) -> Iterator[Deployed]:
    """`rekindle serve` with tiers of these sizes, and a Redis of its own where it has one; warm, and empty but for the
    warm-up's few blocks."""
    with ExitStack() as stack:
        redis_url = ""
        if sizes.redis:
            redis = RedisServer(max_memory_bytes=sizes.redis, eviction_policy="volatile-lru")
            redis_url = stack.enter_context(redis).unix_url
        flags = ["--block-tokens", str(shape.layout.block_tokens)]
        if sizes.disk:
            folder = stack.enter_context(TemporaryDirectory(prefix="rekindle-replay-"))
            flags += ["--disk-dir", folder, "--disk-bytes", str(sizes.disk)]
        metrics_port = free_port()
        address = stack.enter_context(
            deployment(
                model=model,
                redis_url=redis_url,
                device_cache_bytes=sizes.device,
                host_cache_bytes=sizes.host,
                flags=(*flags, "--worker-metrics-port", str(metrics_port)),
            )
        )
        warm_up(address, shape.vocab_size)
        yield Deployed(address, metrics_port)


def run_arm(deploy: Deploy, load: Load, sizes: Sizes, *, speed: float, clients: int, done: Callable[[], object]) -> Arm:
    """Replay a load against a fresh deployment."""
    with deploy(sizes) as (address, metrics_port):
        before = below_the_turns(address, metrics_port)
        served = replay(address, load.work, speed=speed, clients=clients, done=done)
        below = below_the_turns(address, metrics_port).since(before)
    return Arm(sizes=sizes, served=served, below=below, ideal=load.ideal(sizes))


def paired_seconds(
    deploy: Deploy, rounds: Sequence[Load], sides: Sequence[Sizes], *, clients: int, done: Callable[[], object]
) -> list[list[float]]:
    """Seconds that each side takes for each round, as fast as the clients can send it, one side right after another.

    All sides are deployed all the time, and who is first changes from round to round: what the machine does besides
    touches all alike.
    """
    seconds: list[list[float]] = [[] for _ in sides]
    with ExitStack() as stack:
        up = [stack.enter_context(deploy(sizes)) for sizes in sides]
        for number, load in enumerate(rounds):
            for side in sorted(range(len(sides)), key=lambda side: (side + number) % len(sides)):
                began = time.perf_counter()
                replay(up[side].address, load.work, speed=float("inf"), clients=clients, done=done)
                seconds[side].append(time.perf_counter() - began)
    return seconds
