"""Restores that the engine computes a part of: the same tokens and true accounts, wherever the two ends meet."""

import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from cache_store.embedded_redis import RedisServer
from tests import tiny_models
from tests.engines import TENANT, EngineFactory, Turn, generate, poison, start
from worker.calls import MissReason, Token
from worker.engine.engine import Engine
from worker.engine.request import Phase, Request
from worker.engine.restoring import Restoring
from worker.errors import DeadlinePassed
from worker.ids import BlockId

PROMPT = tuple((7 * place + 3) % 300 + 5 for place in range(190))
SECOND = (7, 7, 9, 11, 2)
SIZE = 16


class TakesFront:
    """Computes so many blocks at the front in one piece, and waits for the rest."""

    def __init__(self, count: int) -> None:
        self._count = count

    def plan(self, request: Request, restoring: Restoring, ahead: Iterable[Request]) -> None:
        for number in range(min(self._count, len(restoring.asked))):
            restoring.claims.take(number, MissReason.FASTER)


class TakesAtRandom:
    """Computes a few blocks from the front at each look, now and then also what is on its way."""

    def __init__(self, seed: int) -> None:
        self._numbers = random.Random(seed)

    def plan(self, request: Request, restoring: Restoring, ahead: Iterable[Request]) -> None:
        if request.gaps:
            return
        in_flight = self._numbers.random() < 0.3
        for number, _ in list(restoring.coming())[: self._numbers.randrange(4)]:
            if not restoring.claims.take(number, MissReason.FASTER, in_flight=in_flight):
                return


def remembered(engine: Engine, codec: str = "raw", tenant: str = TENANT) -> tuple[int, ...]:
    """A conversation that lies in Redis alone, the device's free blocks poisoned."""
    history = (*PROMPT, *generate(engine, (), PROMPT, codec=codec, tenant=tenant).reply)
    engine.park(tenant, history, codec=codec, drop_host=True, ttl_s=60).result(30)
    poison(engine)
    return history


def undisturbed(build_engine: EngineFactory) -> Turn:
    engine = build_engine()
    return generate(engine, (*PROMPT, *generate(engine, (), PROMPT).reply), SECOND)


def eventually(check: Callable[[], bool], within_s: float = 30) -> None:
    deadline = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.005)


def test_wherever_the_ends_meet_the_reply_is_the_same(build_engine: EngineFactory, redis_url: str) -> None:
    engine = build_engine(redis_url=redis_url, max_step_tokens=64, max_prefill_tokens=64)
    expected = undisturbed(build_engine)
    for count in (0, 1, 2, 5, 11, 12, 13):
        engine._scheduler._planner = TakesFront(count)
        history = remembered(engine, tenant=f"meeting at {count}")
        turn = generate(engine, history, SECOND, tenant=f"meeting at {count}")
        taken = min(count * SIZE, len(history) - 1)
        assert turn.reply == expected.reply
        assert turn.receipt.redis_tokens == len(history) - 1 - taken
        assert turn.receipt.misses.get(MissReason.FASTER, 0) == taken
        engine.check()


@pytest.mark.parametrize("seed", range(6))
def test_blocks_taken_at_random_times_change_no_token(build_engine: EngineFactory, redis_url: str, seed: int) -> None:
    engine = build_engine(redis_url=redis_url, max_step_tokens=48, max_prefill_tokens=48, max_running=16)
    engine._scheduler._planner = TakesAtRandom(seed)
    history = remembered(engine)
    forks = [(*SECOND, number) for number in range(4)]
    streams = [start(engine, history, fork) for fork in forks]
    turns = [stream.result() for stream in streams]
    alone = build_engine()
    generate(alone, (), PROMPT)
    assert [turn.reply for turn in turns] == [generate(alone, history, fork).reply for fork in forks]
    for turn in turns:
        turn.receipt.check(len(history) + len(SECOND) + 1)


@pytest.mark.parametrize("architecture", ["qwen3", "mistral", "gemma2", "qwen3_moe"])
def test_what_was_half_computed_goes_on_as_transformers_generates(
    architecture: str, tmp_path: Path, build_engine: EngineFactory, redis_url: str
) -> None:
    checkpoint = tiny_models.save_tiny_model(tmp_path / architecture, architecture)
    model = tiny_models.tiny_model(architecture)
    engine = build_engine(
        model=str(checkpoint), redis_url=redis_url, max_step_tokens=40, max_prefill_tokens=40, max_running=8
    )
    engine._scheduler._planner = TakesAtRandom(3)
    history: list[int] = []
    for number, new in enumerate((list(PROMPT[:90]), [9, 8, 7], list(PROMPT[90:120]))):
        turn = generate(engine, history, new, max_new_tokens=10)
        assert list(turn.reply) == tiny_models.generate(model, [*history, *new], 10), f"turn {number}"
        history += [*new, *turn.reply]
        engine.park(TENANT, history, drop_host=True, ttl_s=60).result(30)
        poison(engine)


@pytest.mark.parametrize("codec", ["int8", "int4", "ladder", "lossless"])
def test_codecs_meet_the_computed_front_within_their_bounds(
    build_engine: EngineFactory, redis_url: str, codec: str
) -> None:
    engine = build_engine(redis_url=redis_url, codec_ladder="int8")
    engine._scheduler._planner = TakesFront(4)
    history = remembered(engine, codec)
    stream = start(engine, history, SECOND, codec=codec, audit=True, max_new_tokens=40)
    assert isinstance(stream.next(), Token)
    (request,) = engine._scheduler.running
    is_lossy = [engine._pool.is_lossy(block) for block in request.table[:11]]
    assert is_lossy == [False] * 4 + [codec != "lossless"] * 7, "what was computed is exact, and may be stored"
    turn = stream.result()
    assert turn.receipt.misses[MissReason.FASTER] == 4 * SIZE
    assert turn.receipt.audit is not None
    assert turn.receipt.audit.passed


def test_never_waiting_computes_everything(build_engine: EngineFactory, redis_url: str) -> None:
    engine = build_engine(redis_url=redis_url, restore_plan="compute")
    history = remembered(engine)
    turn = generate(engine, history, SECOND)
    assert turn.reply == undisturbed(build_engine).reply
    assert turn.receipt.computed_tokens == len(history) + len(SECOND)
    assert turn.receipt.misses[MissReason.FASTER] == len(history) - 1
    assert generate(engine, (), PROMPT[:40], tenant="new").receipt.misses == {MissReason.NEW: 40}


def test_a_plan_says_what_it_expected_and_what_came_of_it(build_engine: EngineFactory, redis_url: str) -> None:
    engine = build_engine(redis_url=redis_url, restore_plan="auto")
    history = remembered(engine)
    turn = generate(engine, history, SECOND)
    assert turn.reply == undisturbed(build_engine).reply
    plan = turn.receipt.plan
    assert plan is not None
    assert plan.predicted_ms > 0
    assert plan.actual_ms == pytest.approx(turn.receipt.ttft_ms - turn.receipt.queue_ms)
    computed_instead = sum(turn.receipt.misses.get(why, 0) for why in (MissReason.FASTER, MissReason.LATE))
    assert plan.computed_instead_tokens == computed_instead
    again = generate(engine, (*history, *SECOND, *turn.reply), SECOND)
    assert again.receipt.plan is None, "the device had all that any tier may have had"


def test_a_redis_that_stalls_in_mid_load_is_not_waited_for(build_engine: EngineFactory, own_redis: RedisServer) -> None:
    engine = build_engine(
        redis_url=own_redis.url, restore_plan="auto", redis_timeout_s=30, restore_timeout_s=60, self_measure_s=0
    )
    history = remembered(engine)
    expected = undisturbed(build_engine)
    own_redis.pause()
    began = time.monotonic()
    turn = generate(engine, history, SECOND)
    assert time.monotonic() - began < 5
    assert turn.reply == expected.reply
    assert turn.receipt.redis_tokens == 0
    assert {MissReason.FASTER, MissReason.LATE} & turn.receipt.misses.keys()
    own_redis.resume()


def test_a_cancelled_restore_gives_its_blocks_back_at_once_and_what_still_comes_never_reaches_them(
    build_engine: EngineFactory, own_redis: RedisServer
) -> None:
    engine = build_engine(redis_url=own_redis.url, redis_timeout_s=30, restore_timeout_s=60)
    history = remembered(engine)
    own_redis.pause()
    stream = start(engine, history, SECOND)
    eventually(lambda: [request.phase for request in engine._scheduler.running] == [Phase.RESTORING])
    eventually(lambda: engine._tiers.host.use().blocks > 0)
    engine.cancel(stream.request_id)
    eventually(lambda: engine._pool.stats().used == 0, within_s=5)
    poison(engine)
    own_redis.resume()
    eventually(lambda: engine.locate(TENANT, history, with_redis=False).result(30).host_tokens > 0)
    eventually(lambda: not engine._tiers.host._reserved)
    free = [block for block in range(engine._pool.num_blocks) if engine._pool._free[block]]
    assert all(torch.isnan(engine._tiers.device.view(BlockId(block))).all() for block in free)
    engine.check()
    assert generate(engine, history, SECOND).reply == undisturbed(build_engine).reply


def test_a_deadline_ends_a_turn_that_waits_for_redis(build_engine: EngineFactory, own_redis: RedisServer) -> None:
    engine = build_engine(redis_url=own_redis.url, redis_timeout_s=30, restore_timeout_s=60)
    history = remembered(engine)
    own_redis.pause()
    began = time.monotonic()
    with pytest.raises(DeadlinePassed):
        generate(engine, history, SECOND, deadline_s=began + 0.3)
    assert time.monotonic() - began < 3
    eventually(lambda: engine._pool.stats().used == 0, within_s=5)
    own_redis.resume()


def test_what_does_not_come_in_time_is_computed_even_where_all_is_to_be_loaded(
    build_engine: EngineFactory, own_redis: RedisServer
) -> None:
    engine = build_engine(redis_url=own_redis.url, redis_timeout_s=30, restore_timeout_s=0.3)
    history = remembered(engine)
    own_redis.pause()
    turn = generate(engine, history, SECOND)
    own_redis.resume()
    assert turn.receipt.misses[MissReason.LATE] == len(history) - 1
    assert turn.reply == undisturbed(build_engine).reply


def test_two_turns_that_want_the_same_blocks_fetch_them_once(
    build_engine: EngineFactory, own_redis: RedisServer
) -> None:
    engine = build_engine(redis_url=own_redis.url, redis_timeout_s=30, restore_timeout_s=60)
    history = remembered(engine)
    store = engine._tiers.store
    assert store is not None
    before = store.stats().blocks_got
    own_redis.pause()
    first, second = start(engine, history, SECOND), start(engine, history, (4, 5, 6))
    eventually(lambda: [request.phase for request in engine._scheduler.running] == [Phase.RESTORING] * 2)
    own_redis.resume()
    turns = [first.result(), second.result()]
    for turn in turns:
        assert turn.receipt.redis_tokens + turn.receipt.host_tokens == len(history) - 1
        assert set(turn.receipt.misses) == {MissReason.NEW, MissReason.TAIL}
    assert store.stats().blocks_got - before == -(-(len(history) - 1) // SIZE)
    assert turns[0].reply == undisturbed(build_engine).reply


def test_a_turn_outlives_the_one_whose_fetch_it_waits_for(build_engine: EngineFactory, own_redis: RedisServer) -> None:
    engine = build_engine(redis_url=own_redis.url, redis_timeout_s=30, restore_timeout_s=60)
    history = remembered(engine)
    own_redis.pause()
    first, second = start(engine, history, (4, 5, 6)), start(engine, history, SECOND)
    eventually(lambda: [request.phase for request in engine._scheduler.running] == [Phase.RESTORING] * 2)
    engine.cancel(first.request_id)
    own_redis.resume()
    turn = second.result()
    assert turn.receipt.redis_tokens + turn.receipt.host_tokens == len(history) - 1
    assert turn.reply == undisturbed(build_engine).reply


def test_a_tier_that_is_never_used_is_probed_now_and_then(build_engine: EngineFactory, redis_url: str) -> None:
    engine = build_engine(redis_url=redis_url, restore_plan="compute")
    history = remembered(engine)
    store = engine._tiers.store
    assert store is not None
    generate(engine, history, SECOND)
    assert store.stats().blocks_got == 0
    engine.park(TENANT, history, drop_host=True, ttl_s=60).result(30)
    engine._tiers.transfers._now = lambda: time.monotonic() + 60
    turn = generate(engine, history, SECOND)
    assert turn.receipt.redis_tokens == 0
    eventually(lambda: store.stats().blocks_got == 4)


def test_a_tight_pool_and_many_restores_change_no_token(build_engine: EngineFactory, redis_url: str) -> None:
    roomy = build_engine()
    block = roomy.layout.block_bytes
    tight = build_engine(redis_url=redis_url, device_cache_bytes=24 * block, host_cache_bytes=12 * block)
    tight._scheduler._planner = TakesAtRandom(11)
    prompts = [tuple(range(n, n + 64)) for n in range(0, 128, 16)]
    histories = [(*prompt, *generate(tight, (), prompt).reply) for prompt in prompts]
    streams = [start(tight, history, SECOND, max_new_tokens=30) for history in histories]
    replies = [stream.result().reply for stream in streams]
    assert replies == [generate(roomy, history, SECOND, max_new_tokens=30).reply for history in histories]
