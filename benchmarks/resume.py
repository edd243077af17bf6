"""What a restore is worth: time to first token of a next turn, from Redis alone, against computing the history."""

import time
from collections.abc import Callable
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
        rounds: Counted rounds of the quick sides: restored, the raw read of the same bytes, the bare forward.
        compute_rounds: Counted rounds of the slow sides: the history computed here, and in plain transformers.
        as_json: Print one JSON object.
    """
    model = f"preset:{preset}"
    with RedisServer() as redis, deployment(model=model, redis_url=redis.url) as address, Client(address) as client:
        bench = Resume(client, redis, preset, context, new_tokens)
        quick = interleaved(
            {"restored_s": bench.restored, "raw_read_s": bench.raw_read, "bare_forward_s": bench.bare_forward},
            rounds=rounds,
            quiet=as_json,
            title="resume",
        )
        slow = interleaved(
            {"restored_beside_s": bench.restored, "computed_s": bench.computed, "transformers_s": bench.transformers},
            rounds=compute_rounds,
            quiet=as_json,
            title="resume",
        )
    typical = medians({**quick, **slow})
    limit = typical["raw_read_s"] + typical["bare_forward_s"]
    return finish(
        "resume",
        {**typical, "limit_s": limit, "restored_bytes": bench.restored_bytes, "rounds": {**quick, **slow}},
        [
            at_least(
                "times faster than plain transformers", typical["transformers_s"] / typical["restored_beside_s"], 20
            ),
            at_least("times faster than computing here", typical["computed_s"] / typical["restored_beside_s"], 1),
            at_most("times raw read plus bare forward", typical["restored_s"] / limit, 1.5),
        ],
        as_json=as_json,
    )


class Resume:
    """The sides, each a call that returns its seconds."""

    def __init__(self, client: Client, redis: RedisServer, preset: str, context: int, new_tokens: int) -> None:
        self._client, self._new_tokens, self._context = client, new_tokens, context
        self._loaded, self._plain = load_both(preset)
        self._numbers = count()
        self._session = client.create_session().session_id
        first = client.generate(self._prompt(context - 1), session_id=self._session, max_new_tokens=1, ignore_eos=True)
        first.read()
        client.park_session(self._session, drop_host=True)
        self.restored_bytes = 0
        with redis_py.Redis.from_url(redis.url) as keys:
            names = sorted(keys.scan_iter("rekindle:b:*", count=1000))
            buffers = [memoryview(bytearray(keys.strlen(name))) for name in names]
        self._raw = RawGets(connect(redis.url), names, buffers)
        layout = self._loaded.layout
        num_blocks = -(-(context + new_tokens) // layout.block_tokens)
        self._kv_cache = KVCache(layout, num_blocks, self._loaded.device)
        self._runner = ModelRunner(self._loaded, self._kv_cache)
        self._table = [BlockId(block) for block in range(num_blocks)]

    def restored(self) -> float:
        """The next turn of the parked session, seen by the client. The turn goes to a fork, so all rounds are equal."""
        fork = self._client.fork_session(self._session).session_id
        seconds, receipt = self._first_token(fork)
        assert receipt.redis_tokens == self._context - 1, f"not restored from Redis alone: {receipt}"
        self.restored_bytes = receipt.restored_bytes
        for session in (fork, self._session):  # the fork knows nothing of the unfull block that it grew out of
            self._client.park_session(session, drop_host=True)
        return seconds

    def computed(self) -> float:
        """The same turn on a conversation that no tier knows."""
        tokens = self._prompt(self._context + self._new_tokens)
        return _timed(lambda: self._client.generate(tokens, max_new_tokens=1, ignore_eos=True).read())

    def raw_read(self) -> float:
        """The session's values over a plain socket, into memory that was touched before."""
        return _timed(self._raw.get)

    def bare_forward(self) -> float:
        """The new tokens alone through the model, their history lying in the device's blocks."""
        chunk = Chunk(self._prompt(self._new_tokens), self._context, self._table, True)
        return _timed(lambda: self._runner.run([chunk]))

    def transformers(self) -> float:
        """History and new tokens through transformers' own forward, as its `generate` would prefill them."""
        tokens = torch.tensor([self._prompt(self._context + self._new_tokens)])
        with torch.inference_mode():
            return _timed(lambda: self._plain(input_ids=tokens, use_cache=True, logits_to_keep=1))

    def _first_token(self, session_id: str) -> tuple[float, pb.Receipt]:
        tokens = self._prompt(self._new_tokens)
        began = time.perf_counter()
        generation = self._client.generate(tokens, session_id=session_id, max_new_tokens=1, ignore_eos=True)
        next(iter(generation))
        seconds = time.perf_counter() - began
        generation.read()
        assert generation.receipt is not None
        return seconds, generation.receipt

    def _prompt(self, num_tokens: int) -> tuple[int, ...]:
        return prompt(next(self._numbers), num_tokens, self._loaded.vocab_size)


def _timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began
