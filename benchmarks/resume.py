"""What a restore is worth: time to the first token of a next turn, from Redis or host memory, against computing it."""

import socket
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import count

import redis as redis_py
import torch

from benchmarks.bare_models import load_both
from benchmarks.deployment import deployment
from benchmarks.harness import at_least, at_most, finish, interleaved, medians
from benchmarks.overhead import prompt
from benchmarks.raw_socket import RawGets, connect
from cache_store.embedded_redis import RedisServer
from protos import rekindle_pb2 as pb
from rekindle.sync_client import Client
from worker.engine.step import Chunk
from worker.ids import BlockId
from worker.model.runner import ModelRunner
from worker.tiers.kv_cache import KVCache

_CODECS = ("raw", "int8")
_STAGES = ("outside", "queue", "restore", "prefill")


def run(
    *,
    preset: str = "qwen3-0.6b",
    context: int = 2048,
    new_tokens: int = 32,
    rounds: int = 7,
    compute_rounds: int = 3,
    as_json: bool = False,
) -> int:
    """Time the first token of a turn of `new_tokens` on a conversation of `context` tokens.

    Args:
        preset: Shape of the model (random weights).
        context: Tokens of history.
        new_tokens: Tokens that the turn adds.
        rounds: Counted rounds of the quick sides: restored, by codec and tier; the raw reads; the bare forward.
        compute_rounds: Counted rounds of the slow sides: the history computed here, and in plain transformers.
        as_json: Print one JSON object.
    """
    model = f"preset:{preset}"
    with RedisServer() as redis, deployment(model=model, redis_url=redis.url) as address, Client(address) as client:
        bench = Resume(client, preset, context, new_tokens)
        with redis_py.Redis.from_url(redis.url) as keys:
            sessions = {codec: Parked(bench, codec, keys, connect(redis.url)) for codec in _CODECS}
        quick_sides = {"bare_forward_s": bench.bare_forward}
        for codec, session in sessions.items():
            quick_sides[f"{codec}_redis_s"] = session.from_redis
            quick_sides[f"{codec}_host_s"] = session.from_host
            quick_sides[f"{codec}_raw_read_s"] = session.raw_read
        quick = interleaved(quick_sides, rounds=rounds, quiet=as_json, title="resume")
        stages = {f"{codec}_{tier}_ms": ms for codec, session in sessions.items() for tier, ms in session.stages_ms()}
        slow_sides = {
            "restored_beside_s": sessions["raw"].from_redis,
            "computed_s": bench.computed,
            "transformers_s": bench.transformers,
        }
        slow = interleaved(slow_sides, rounds=compute_rounds, quiet=as_json, title="resume")
    typical = medians({**quick, **slow})
    limits = {f"{codec}_limit_s": typical[f"{codec}_raw_read_s"] + typical["bare_forward_s"] for codec in _CODECS}
    stored = {f"{codec}_bytes": session.num_bytes for codec, session in sessions.items()}
    return finish(
        "resume",
        {**typical, **limits, **stored, **stages, "rounds": {**quick, **slow}},
        [
            at_least(
                "times faster than plain transformers", typical["transformers_s"] / typical["restored_beside_s"], 20
            ),
            at_least("times faster than computing here", typical["computed_s"] / typical["restored_beside_s"], 1),
            *(
                at_most(f"{codec}: times raw read plus bare forward", typical[f"{codec}_redis_s"] / limit, 1.25)
                for codec, limit in zip(_CODECS, limits.values(), strict=True)
            ),
            at_most("raw: s from Redis", typical["raw_redis_s"], 0.35),
            at_most("raw: s from host memory", typical["raw_host_s"], 0.3),
        ],
        as_json=as_json,
    )


class Parked:
    """A conversation in one codec, parked before each turn; turns go to forks of it, so all are equal.

    Its sides return seconds to the first token as the client sees it, and note what the receipts say of them.
    """

    def __init__(self, bench: "Resume", codec: str, keys: redis_py.Redis, sock: socket.socket) -> None:
        self._bench = bench
        self._client = bench.client
        before = set(keys.scan_iter("rekindle:b:*", count=1000))
        self._session = bench.client.create_session(codec=codec).session_id
        bench.turn(self._session, bench.context - 1)
        self._park(self._session)
        names = sorted(set(keys.scan_iter("rekindle:b:*", count=1000)) - before)
        copies = [b"raw:" + name for name in names]  # a block that a plan has computed again may change its length
        for name, copy in zip(names, copies, strict=True):
            keys.copy(name, copy)
        buffers = [memoryview(bytearray(keys.strlen(copy))) for copy in copies]
        self.num_bytes = sum(buffer.nbytes for buffer in buffers)
        self._raw = RawGets(sock, copies, buffers)
        self._stages: dict[str, list[list[float]]] = {}

    def from_redis(self) -> float:
        """From Redis alone: device and host tier hold nothing of it."""
        return self._turn("redis")

    def from_host(self) -> float:
        """From host memory: all of it was brought there, and the device has dropped it."""
        self._client.warm_session(self._session)
        self._client.park_session(self._session)
        return self._turn("host")

    def raw_read(self) -> float:
        """The session's values over a plain socket, into memory that was touched before."""
        return _timed(self._raw.get)

    def stages_ms(self) -> Iterator[tuple[str, dict[str, float]]]:
        """By tier, the medians: the client's wait less the worker's, then the worker's stages up to the first token."""
        for tier, rounds in self._stages.items():
            yield tier, dict(zip(_STAGES, map(statistics.median, zip(*rounds[1:], strict=True)), strict=True))

    def _turn(self, tier: str) -> float:
        fork = self._client.fork_session(self._session).session_id
        seconds, receipt = self._bench.turn(fork, self._bench.new_tokens)
        restored = {"redis": receipt.redis_tokens, "host": receipt.host_tokens}
        assert restored[tier] > 0, f"not restored from {tier}: {receipt}"
        assert receipt.device_tokens + sum(restored.values()) == restored[tier], f"not from {tier} alone: {receipt}"
        outside_ms = seconds * 1e3 - receipt.ttft_ms
        stages = [outside_ms, receipt.queue_ms, receipt.restore_ms, receipt.prefill_ms]
        self._stages.setdefault(tier, []).append(stages)
        for session in (fork, self._session):  # the fork knows nothing of the unfull block that it grew out of
            self._park(session)
        return seconds

    def _park(self, session: str) -> None:
        self._client.park_session(session, drop_host=True)


class Resume:
    """One deployment to ask, and the same model in this process."""

    def __init__(self, client: Client, preset: str, context: int, new_tokens: int) -> None:
        self.client, self.new_tokens, self.context = client, new_tokens, context
        self._loaded, self._plain = load_both(preset)
        self._numbers = count()
        layout = self._loaded.layout
        num_blocks = -(-(context + new_tokens) // layout.block_tokens)
        self._kv_cache = KVCache(layout, num_blocks, self._loaded.device)
        self._runner = ModelRunner(self._loaded, self._kv_cache)
        self._table = [BlockId(block) for block in range(num_blocks)]

    def turn(self, session_id: str, num_tokens: int) -> tuple[float, pb.Receipt]:
        """A turn of so many new tokens: seconds to the first of its reply, and its receipt."""
        tokens = self._prompt(num_tokens)
        began = time.perf_counter()
        generation = self.client.generate(tokens, session_id=session_id, max_new_tokens=1, ignore_eos=True)
        next(iter(generation))
        seconds = time.perf_counter() - began
        generation.read()
        assert generation.receipt is not None
        return seconds, generation.receipt

    def computed(self) -> float:
        """The same turn on a conversation that no tier knows."""
        tokens = self._prompt(self.context + self.new_tokens)
        return _timed(lambda: self.client.generate(tokens, max_new_tokens=1, ignore_eos=True).read())

    def bare_forward(self) -> float:
        """The new tokens alone through the model, their history lying in the device's blocks."""
        chunk = Chunk(self._prompt(self.new_tokens), self.context, self._table, True)
        return _timed(lambda: self._runner.run([chunk]))

    def transformers(self) -> float:
        """History and new tokens through transformers' own forward, as its `generate` would prefill them."""
        tokens = torch.tensor([self._prompt(self.context + self.new_tokens)])
        with torch.inference_mode():
            return _timed(lambda: self._plain(input_ids=tokens, use_cache=True, logits_to_keep=1))

    def _prompt(self, num_tokens: int) -> tuple[int, ...]:
        return prompt(next(self._numbers), num_tokens, self._loaded.vocab_size)


def _timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began
