"""The restore planner beside always loading and always computing, with Redis behind a link of limited rate."""

import queue
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config

from benchmarks.fault_proxy import FaultProxy
from benchmarks.harness import Bar, at_least, at_most, finish, interleaved, medians
from benchmarks.overhead import prompt
from cache_store.embedded_redis import RedisServer
from worker.calls import Event, Failed, Finished, GenerateCall, Receipt, Sampling, Token
from worker.config import WorkerConfig
from worker.engine.build_engine import build_engine
from worker.engine.engine import Engine
from worker.model.presets import random_model

_TENANT = "benchmark"
_TIE = 1.2
"""Loading and computing tie where neither takes longer than the other by more than this."""


def run(
    *,
    contexts: Sequence[int] = (128, 512, 2048, 8192),
    gb_per_s: Sequence[float] = (0.05, 0.2, 1.0, 5.0),
    layers: int = 4,
    hidden: int = 384,
    kv_heads: int = 6,
    new_tokens: int = 16,
    rounds: int = 3,
    as_json: bool = False,
) -> int:
    """Time the first token of a turn on a conversation that lies in Redis alone, by each way to have its KV.

    The default shape is small, so that all of it takes less than ten minutes on two cores: its KV is heavy for its
    size, so that at the slowest rate loading and computing take about as long.

    Args:
        contexts: Tokens of history.
        gb_per_s: Rates of the link to Redis.
        layers: Of the model (random weights).
        hidden: Width of the model; heads have 64.
        kv_heads: Heads of queries, and of keys and values.
        new_tokens: Tokens that the turn adds.
        rounds: Counted rounds of each side.
        as_json: Print one JSON object.
    """
    shape = (layers, hidden, kv_heads, max(contexts) + 1024)
    figures: dict[str, Any] = {}
    bars: list[Bar] = []
    with _sides(shape) as (sides, link):
        histories = [sides[-1].remember(context) for context in contexts]  # what it computes it learns from
        for rate in gb_per_s:
            link.set(bytes_per_s=rate * 1e9)
            sides[-1].learn(max(histories, key=len))
            for context, history in zip(contexts, histories, strict=True):
                name = f"{rate:g} GB/s, {context} tokens"
                calls = {side.plan: side.timed(history, new_tokens) for side in sides}
                measured = interleaved(calls, rounds=rounds, quiet=as_json, title=name)
                typical = medians(measured)
                figures |= {f"{name}: {plan} s": seconds for plan, seconds in typical.items()}
                figures |= {f"{name}: {plan} rounds": seconds for plan, seconds in measured.items()}
                figures[f"{name}: plans"] = sides[-1].plans(rounds)
                bars += _bars(name, typical)
    return finish("planner", figures, bars, as_json=as_json)


def _bars(name: str, typical: dict[str, float]) -> list[Bar]:
    load, compute, auto = typical["load"], typical["compute"], typical["auto"]
    bars = [at_most(f"{name}: times the better", auto / min(load, compute), 1.1)]
    if max(load, compute) <= _TIE * min(load, compute):
        bars.append(at_least(f"{name}: times faster than both", min(load, compute) / auto, 1.5))
    return bars


@contextmanager
def _sides(shape: tuple[int, int, int, int]) -> Iterator[tuple[list["_Side"], FaultProxy]]:
    """An engine for each way, all on one model and one Redis behind one link."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rekindle-planner-")))
        _save_model(folder, *shape)
        link = stack.enter_context(FaultProxy(stack.enter_context(RedisServer()).port))
        sides = [_Side(folder, link.port, plan) for plan in ("load", "compute", "auto")]
        for side in sides:
            stack.callback(side.engine.close)
        yield sides, link


def _save_model(folder: Path, layers: int, hidden: int, heads: int, max_tokens: int) -> None:
    config = Qwen3Config(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
        vocab_size=512,
        max_position_embeddings=max_tokens,
        tie_word_embeddings=True,
    )
    random_model(config, torch.float32, seed=0).save_pretrained(folder)


class _Side:
    def __init__(self, model: Path, redis_port: int, plan: str) -> None:
        self.plan = plan
        self.engine: Engine = build_engine(
            WorkerConfig(
                model=str(model),
                block_tokens=16,
                device_cache_bytes=1 << 29,
                host_cache_bytes=1 << 29,
                host_cache_dir="",
                redis_url=f"redis://127.0.0.1:{redis_port}",
                redis_timeout_s=10.0,
                restore_timeout_s=120.0,  # always loading means: however long it takes
                restore_plan=plan,
            )
        )
        self._numbers = count(1)
        self._receipts: list[Receipt] = []

    def remember(self, num_tokens: int) -> tuple[int, ...]:
        """A conversation of so many tokens that lies in Redis alone."""
        tokens = prompt(num_tokens, num_tokens - 1, self.engine.vocab_size)
        reply, _, _ = self._turn((), tokens)
        history = (*tokens, reply)
        self.engine.park(_TENANT, history, drop_host=True, ttl_s=0).result(60)
        return history

    def learn(self, history: tuple[int, ...]) -> None:
        """Bring a conversation here and forget it: a worker that runs knows the link from its traffic."""
        self.engine.warm(_TENANT, history).result(120)
        self.engine.drop(_TENANT, history, with_redis=False).result(120)

    def timed(self, history: tuple[int, ...], num_new: int) -> Callable[[], float]:
        """A call that runs a turn on the conversation and gives the seconds to its first token."""

        def measure() -> float:
            new = prompt(next(self._numbers), num_new, self.engine.vocab_size)
            _, seconds, receipt = self._turn(history, new)
            self._receipts.append(receipt)
            self.engine.drop(_TENANT, (*history, *new), with_redis=False).result(120)
            return seconds

        return measure

    def plans(self, num: int) -> list[str]:
        """What the latest turns had planned: predicted and actual ms, and the tokens computed instead of loaded."""
        plans = [receipt.plan for receipt in self._receipts[-num:] if receipt.plan is not None]
        return [
            f"{plan.kind.name} {plan.predicted_ms:.0f} {plan.actual_ms:.0f} {plan.computed_instead_tokens}"
            for plan in plans
        ]

    def _turn(self, history: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, float, Receipt]:
        """The one token of the reply, the seconds until it came, and what it cost."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        call = GenerateCall(
            request_id="turn", tenant=_TENANT, history=history, input=new, sampling=Sampling(), max_new_tokens=1
        )
        began = time.perf_counter()
        self.engine.submit(call, events.put)
        token = events.get()
        seconds = time.perf_counter() - began
        if isinstance(token, Failed):
            raise token.error
        end = events.get()
        assert isinstance(token, Token)
        assert isinstance(end, Finished)
        return token.token_id, seconds, end.receipt
