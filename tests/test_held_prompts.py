"""Prompts that come together run together, though one's blocks are found at once and another's are still looked for."""

import time
from collections.abc import Sequence

import pytest
import torch

from cache_store.embedded_redis import RedisServer
from tests.engines import EngineFactory, generate, start
from worker.calls import Token
from worker.engine import stepper
from worker.engine.engine import Engine
from worker.engine.step import Chunk
from worker.engine.stepper import Runner

HOT = tuple((7 * place + 3) % 300 + 5 for place in range(190))
UNKNOWN = tuple((11 * place + 2) % 300 + 5 for place in range(190))
NEW = (7, 7, 9, 11, 2)
LOOKED_FOR_S = 1.0


class Watched:
    """A runner that notes how long the chunks of each step were."""

    def __init__(self, runner: Runner) -> None:
        self.steps: list[list[int]] = []
        self._runner = runner

    def run(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        self.steps.append([len(chunk.token_ids) for chunk in chunks])
        return self._runner.run(chunks)


def hot_engine(build_engine: EngineFactory, redis: RedisServer) -> tuple[Engine, tuple[int, ...], Watched]:
    """An engine, a history on its device, and what it runs from now on, with a Redis that answers no more."""
    engine = build_engine(redis_url=redis.url, redis_timeout_s=30, restore_timeout_s=LOOKED_FOR_S, self_measure_s=0)
    history = (*HOT, *generate(engine, (), HOT).reply)
    redis.pause()
    watched = Watched(engine._stepper._runner)
    engine._stepper._runner = watched
    return engine, history, watched


def test_a_prompt_that_costs_much_is_held_back_for_one_that_is_still_looked_for(
    build_engine: EngineFactory, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stepper, "_HELD_SHARE", 1e6)  # as if the few tokens took hours
    engine, history, watched = hot_engine(build_engine, own_redis)
    streams = [start(engine, (), UNKNOWN), start(engine, history, NEW)]
    for stream in streams:
        assert len(stream.result().reply) == 8
    assert watched.steps[0] == [len(UNKNOWN), len(NEW) + 1], "the last token of a history has no KV yet"
    own_redis.resume()


def test_a_prompt_that_costs_little_waits_for_nobody(build_engine: EngineFactory, own_redis: RedisServer) -> None:
    engine, history, watched = hot_engine(build_engine, own_redis)
    looked_for, hot = start(engine, (), UNKNOWN), start(engine, history, NEW)
    began = time.monotonic()
    assert isinstance(hot.next(), Token)
    assert time.monotonic() - began < LOOKED_FOR_S / 2
    assert watched.steps[0] == [len(NEW) + 1]
    for stream in (hot, looked_for):
        stream.result()
    own_redis.resume()


def test_nobody_who_decodes_is_held_up(
    build_engine: EngineFactory, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stepper, "_HELD_SHARE", 1e6)
    engine, history, _ = hot_engine(build_engine, own_redis)
    decoding = start(engine, history, NEW, max_new_tokens=200)
    assert isinstance(decoding.next(), Token)
    looked_for = start(engine, (), UNKNOWN)
    began = time.monotonic()
    for _ in range(20):
        assert isinstance(decoding.next(), Token)
    assert time.monotonic() - began < LOOKED_FOR_S / 2
    for stream in (decoding, looked_for):
        stream.result()
    own_redis.resume()
