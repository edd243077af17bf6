"""The engine: what a turn costs, what it finds again, and that it says the same whatever happened in between."""

import time
from collections.abc import Callable, Sequence
from threading import Thread

import pytest
import torch
from redis import Redis

from cache_store.embedded_redis import RedisServer
from cache_store.errors import StoreUnavailable
from cache_store.ids import BlockHash
from cache_store.open_store import open_block_store
from cache_store.store import Store
from tests.engines import TENANT, EngineFactory, Turn, generate, poison, start
from worker.calls import PLAIN, Failed, Finished, FinishReason, MissReason, Sampling, Token
from worker.engine.engine import Engine
from worker.engine.sampler import LogitsNotFinite
from worker.engine.step import Chunk
from worker.errors import ContextTooLong, DeadlinePassed, Draining, Overloaded

PROMPT = tuple(range(5, 55))
SECOND = (7, 7, 9, 11, 2)


def two_turns(engine: Engine, between: "list[str] | None" = None) -> tuple[Turn, Turn]:
    first = generate(engine, (), PROMPT)
    history = (*PROMPT, *first.reply)
    for what in between or ():
        if what == "park":
            engine.park(TENANT, history, drop_host=False, ttl_s=60).result(30)
        elif what == "park wholly":
            engine.park(TENANT, history, drop_host=True, ttl_s=60).result(30)
        elif what == "poison":
            poison(engine)
    return first, generate(engine, history, SECOND)


def key_of(name: BlockHash) -> str:
    return f"rekindle:b:{name.hex()}"


def undisturbed(build_engine: EngineFactory) -> tuple[Turn, Turn]:
    return two_turns(build_engine())


def test_a_first_turn_is_computed_and_all_of_it_is_new(build_engine: EngineFactory) -> None:
    turn = generate(build_engine(), (), PROMPT)
    assert turn.receipt.computed_tokens == len(PROMPT)
    assert turn.receipt.misses == {MissReason.NEW: len(PROMPT)}
    assert turn.finished.reason is FinishReason.LENGTH
    assert len(turn.reply) == turn.finished.completion_tokens == 8


def test_the_next_turn_finds_the_whole_history_on_the_device(build_engine: EngineFactory) -> None:
    _, second = two_turns(build_engine())
    receipt = second.receipt
    assert receipt.device_tokens == len(PROMPT) + 8 - 1
    assert receipt.misses == {MissReason.NEW: len(SECOND), MissReason.TAIL: 1}


def test_the_prefill_that_a_tier_spared_is_counted_when_it_was_spared(build_engine: EngineFactory) -> None:
    engine = build_engine()
    generate(engine, (), PROMPT)
    assert engine.stats().prefill_s_saved == 0
    generate(engine, (), PROMPT)
    saved_s = engine.stats().prefill_s_saved
    assert saved_s > 0
    generate(engine, (), PROMPT[::-1])  # finds nothing, and changes what prefill is believed to cost
    assert engine.stats().prefill_s_saved == saved_s


@pytest.mark.parametrize(
    ("between", "source"),
    [(["park", "poison"], "host_tokens"), (["park wholly", "poison"], "redis_tokens")],
)
def test_a_parked_conversation_goes_on_with_the_same_tokens(
    build_engine: EngineFactory, redis_url: str, between: list[str], source: str
) -> None:
    engine = build_engine(redis_url=redis_url)
    turns = two_turns(engine, between)
    assert [turn.reply for turn in turns] == [turn.reply for turn in undisturbed(build_engine)]
    assert getattr(turns[1].receipt, source) == len(PROMPT) + 8 - 1
    assert turns[1].receipt.restored_bytes > 0


def test_another_worker_resumes_from_redis_with_the_same_tokens(build_engine: EngineFactory, redis_url: str) -> None:
    one, other = build_engine(redis_url=redis_url), build_engine(redis_url=redis_url)
    first = generate(one, (), PROMPT)
    history = (*PROMPT, *first.reply)
    one.park(TENANT, history, drop_host=True, ttl_s=60).result(30)
    second = generate(other, history, SECOND)
    assert second.receipt.redis_tokens == len(history) - 1
    assert second.reply == undisturbed(build_engine)[1].reply


def test_full_blocks_reach_redis_by_themselves_prompt_and_reply_alike(
    build_engine: EngineFactory, redis_url: str
) -> None:
    one, other = build_engine(redis_url=redis_url), build_engine(redis_url=redis_url)
    first = generate(one, (), PROMPT, max_new_tokens=20)
    history = (*PROMPT, *first.reply)
    one.flush(TENANT, history).result(30)
    second = generate(other, history, SECOND)
    assert second.receipt.redis_tokens == 64
    assert second.receipt.misses == {
        MissReason.ABSENT: len(history) - 64 - 1,
        MissReason.TAIL: 1,
        MissReason.NEW: len(SECOND),
    }


def test_another_tenant_finds_nothing(build_engine: EngineFactory) -> None:
    engine = build_engine()
    generate(engine, (), PROMPT)
    assert generate(engine, (), PROMPT, tenant="another").receipt.computed_tokens == len(PROMPT)


def test_the_same_prompt_again_computes_its_last_token_only(build_engine: EngineFactory) -> None:
    engine = build_engine()
    prompt = PROMPT[:48]
    first = generate(engine, (), prompt)
    again = generate(engine, (), prompt)
    assert again.reply == first.reply
    assert again.receipt.computed_tokens == 1
    assert again.receipt.misses == {MissReason.TAIL: 1}


def test_forks_share_a_history_and_do_not_write_into_each_other(build_engine: EngineFactory) -> None:
    engine = build_engine()
    history = (*PROMPT, *generate(engine, (), PROMPT).reply)
    left = generate(engine, history, (3, 4), max_new_tokens=20)
    right = generate(engine, history, (400, 401), max_new_tokens=20)
    assert left.receipt.device_tokens == right.receipt.device_tokens == len(history) - 1
    alone = build_engine()
    assert generate(alone, history, (3, 4), max_new_tokens=20).reply == left.reply
    assert generate(alone, history, (400, 401), max_new_tokens=20).reply == right.reply
    assert generate(engine, history, (3, 4), max_new_tokens=20).reply == left.reply


def test_blocks_that_redis_lost_are_computed_one_by_one(build_engine: EngineFactory, own_redis: RedisServer) -> None:
    engine = build_engine(redis_url=own_redis.url)
    prompt = tuple(range(5, 105))
    first = generate(engine, (), prompt)
    history = (*prompt, *first.reply)
    engine.park(TENANT, history, drop_host=True, ttl_s=60).result(30)
    names = engine._conversations.history(TENANT, history, "raw", PLAIN).names()
    with Redis.from_url(own_redis.url) as client:
        assert client.delete(key_of(names[1]), key_of(names[4])) == 2
    poison(engine)
    second = generate(engine, history, SECOND)
    assert second.receipt.redis_tokens == len(history) - 1 - 32
    assert second.receipt.misses[MissReason.ABSENT] == 32
    fresh = build_engine()
    generate(fresh, (), prompt)
    assert second.reply == generate(fresh, history, SECOND).reply


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda value: value[:-7], MissReason.CORRUPT),
        (lambda value: value[:900] + bytes([value[900] ^ 1]) + value[901:], MissReason.CORRUPT),
        (lambda value: b"", MissReason.CORRUPT),
    ],
    ids=["truncated", "one bit", "empty"],
)
def test_a_spoilt_block_is_a_miss_with_its_reason(
    build_engine: EngineFactory, own_redis: RedisServer, spoil: Callable[[bytes], bytes], reason: MissReason
) -> None:
    engine = build_engine(redis_url=own_redis.url)
    first = generate(engine, (), PROMPT)
    history = (*PROMPT, *first.reply)
    engine.park(TENANT, history, drop_host=True, ttl_s=60).result(30)
    key = key_of(engine._conversations.history(TENANT, history, "raw", PLAIN).names()[1])
    with Redis.from_url(own_redis.url) as client:
        client.set(key, spoil(client.get(key)))
    poison(engine)
    second = generate(engine, history, SECOND)
    assert second.receipt.misses[reason] == 16
    assert second.receipt.redis_tokens == len(history) - 1 - 16
    assert second.reply == undisturbed(build_engine)[1].reply


def test_a_block_of_another_model_is_refused_and_left_where_it_is(
    build_engine: EngineFactory, own_redis: RedisServer
) -> None:
    engine = build_engine(redis_url=own_redis.url)
    history = (*PROMPT, *generate(engine, (), PROMPT).reply)
    engine.park(TENANT, history, drop_host=True, ttl_s=60).result(30)
    name = engine._conversations.history(TENANT, history, "raw", PLAIN).names()[1]
    others = open_block_store(own_redis.url, engine.layout, b"another model", timeout_s=2, refresh_ttl_s=60)
    assert others is not None
    others.put([Store(name, 16, memoryview(bytes(engine.layout.block_bytes)), ttl_s=60)])
    others.close()
    poison(engine)
    second = generate(engine, history, SECOND)
    assert second.receipt.misses[MissReason.FOREIGN] == 16
    assert second.reply == undisturbed(build_engine)[1].reply
    assert engine.locate(TENANT, history, with_redis=True).result(30).redis_tokens == len(history) - 1


def test_without_redis_turns_go_on_and_say_why_they_computed(
    build_engine: EngineFactory, own_redis: RedisServer
) -> None:
    one, other = build_engine(redis_url=own_redis.url), build_engine(redis_url=own_redis.url)
    first = generate(one, (), PROMPT)
    history = (*PROMPT, *first.reply)
    one.park(TENANT, history, drop_host=True, ttl_s=60).result(30)
    own_redis.kill()
    second = generate(other, history, SECOND)
    assert second.receipt.misses[MissReason.UNAVAILABLE] == len(history) - 1
    assert second.reply == undisturbed(build_engine)[1].reply
    own_redis.start()
    assert stored_again(one)


def stored_again(engine: Engine) -> bool:
    """New blocks reach Redis, within the breaker's patience."""
    deadline = time.monotonic() + 20
    for number in range(1000):
        prompt = tuple(range(number, number + 40))
        generate(engine, (), prompt, max_new_tokens=1)
        engine.flush(TENANT, prompt).result(30)
        try:
            if engine.locate(TENANT, prompt, with_redis=True).result(30).redis_tokens == 32:
                return True
        except StoreUnavailable:
            pass  # the breaker is still open
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return False


def test_redis_absent_at_start_is_no_reason_not_to_start(build_engine: EngineFactory) -> None:
    engine = build_engine(redis_url="redis://127.0.0.1:1", redis_timeout_s=0.5)
    assert generate(engine, (), PROMPT).reply == undisturbed(build_engine)[0].reply


def test_a_cancelled_request_gives_its_blocks_back_at_once(build_engine: EngineFactory) -> None:
    engine = build_engine()
    stream = start(engine, (), PROMPT, max_new_tokens=1500)
    assert isinstance(stream.next(), Token)
    engine.cancel(stream.request_id)
    deadline = time.monotonic() + 5
    while engine.stats().running and time.monotonic() < deadline:
        time.sleep(0.005)
    assert engine.stats().running == 0
    engine.check()


def test_a_deadline_ends_a_request(build_engine: EngineFactory) -> None:
    engine = build_engine()
    began = time.monotonic()
    with pytest.raises(DeadlinePassed):
        generate(engine, (), PROMPT, max_new_tokens=1900, deadline_s=began + 0.3)
    assert time.monotonic() - began < 2


def test_stop_tokens_end_the_reply_and_are_part_of_it(build_engine: EngineFactory) -> None:
    engine = build_engine()
    free = generate(engine, (), PROMPT, max_new_tokens=20)
    stop = free.reply[5]
    turn = generate(engine, (), PROMPT, max_new_tokens=20, stop_token_ids=[stop])
    assert turn.finished.reason is FinishReason.STOP
    assert turn.reply == free.reply[: free.reply.index(stop) + 1]


def test_a_reply_cut_short_keeps_what_was_kept_for_the_next_turn(build_engine: EngineFactory) -> None:
    engine = build_engine()
    stream = start(engine, (), PROMPT, max_new_tokens=1000)
    reply = [stream.next() for _ in range(5)]
    engine.finish(stream.request_id, 5)
    while isinstance(event := stream.next(), Token):
        pass
    assert isinstance(event, Finished)
    assert (event.reason, event.completion_tokens) == (FinishReason.STOP, 5)
    history = (*PROMPT, *(token.token_id for token in reply if isinstance(token, Token)))
    second = generate(engine, history, SECOND)
    assert second.receipt.device_tokens == len(history) - 1
    fresh = build_engine()
    assert generate(fresh, history, SECOND).reply == second.reply


def test_what_does_not_fit_is_refused_with_the_numbers(build_engine: EngineFactory) -> None:
    engine = build_engine()
    with pytest.raises(ContextTooLong, match=r"50 prompt tokens .* and 5000 new ones are 5050"):
        generate(engine, (), PROMPT, max_new_tokens=5000)


def test_a_full_queue_refuses_before_it_accepts(build_engine: EngineFactory) -> None:
    engine = build_engine(max_running=1, max_waiting=1)
    streams = [start(engine, (), PROMPT, max_new_tokens=200) for _ in range(2)]
    with pytest.raises(Overloaded) as refused:
        start(engine, (), PROMPT)
    assert refused.value.retry_after_s > 0
    assert streams[0].result().reply == streams[1].result().reply


def many(engine: Engine, count: int, sampling: Sequence[Sampling], max_new_tokens: int) -> list[tuple[int, ...]]:
    streams = [
        start(
            engine,
            (),
            tuple(range(number, number + 20 + 3 * number)),
            sampling=sampling[number % len(sampling)],
            max_new_tokens=max_new_tokens,
        )
        for number in range(count)
    ]
    return [stream.result().reply for stream in streams]


def test_a_pool_too_small_for_all_makes_some_wait_and_changes_no_token(build_engine: EngineFactory) -> None:
    roomy = build_engine()
    tight = build_engine(device_cache_bytes=24 * roomy.layout.block_bytes)
    assert many(tight, 8, [Sampling()], 60) == many(roomy, 8, [Sampling()], 60)


def test_a_turn_that_gave_way_in_mid_reply_says_how_long_its_first_prefill_took(build_engine: EngineFactory) -> None:
    engine = build_engine(device_cache_bytes=24 * build_engine().layout.block_bytes)
    streams = [start(engine, (), (*PROMPT, number), max_new_tokens=60) for number in range(8)]
    assert all(stream.result().receipt.prefill_ms >= 0 for stream in streams)


def test_a_seed_gives_the_same_tokens_alone_and_in_a_busy_batch(build_engine: EngineFactory) -> None:
    engine = build_engine()
    sampling = Sampling(temperature=0.9, top_p=0.95, seed=42)
    alone = generate(engine, (), PROMPT, sampling=sampling, max_new_tokens=24).reply
    noise = [start(engine, (), tuple(range(n, n + 30)), max_new_tokens=60) for n in range(6)]
    assert generate(engine, (), PROMPT, sampling=sampling, max_new_tokens=24).reply == alone
    for stream in noise:
        stream.result()
    other = Sampling(temperature=0.9, top_p=0.95, seed=43)
    assert generate(engine, (), PROMPT, sampling=other, max_new_tokens=24).reply != alone


def test_more_conversations_than_the_device_holds_come_back_from_below(
    build_engine: EngineFactory, redis_url: str
) -> None:
    roomy = build_engine()
    block = roomy.layout.block_bytes
    tight = build_engine(redis_url=redis_url, device_cache_bytes=20 * block, host_cache_bytes=24 * block)
    prompts = [tuple(range(n, n + 64)) for n in range(0, 160, 16)]
    histories = [(*prompt, *generate(tight, (), prompt).reply) for prompt in prompts]
    replies = [generate(tight, history, SECOND) for history in histories]
    assert [turn.reply for turn in replies] == [generate(roomy, history, SECOND).reply for history in histories]
    stats = tight.stats()
    assert stats.redis_tokens > 0
    assert stats.evicted_then_needed > 0
    total = stats.device_tokens + stats.host_tokens + stats.redis_tokens + stats.computed_tokens
    assert total == sum(map(len, prompts)) + sum(len(history) + len(SECOND) for history in histories)


def test_warming_brings_a_parked_conversation_to_the_device(build_engine: EngineFactory, redis_url: str) -> None:
    engine = build_engine(redis_url=redis_url)
    history = (*PROMPT, *generate(engine, (), PROMPT).reply)
    engine.park(TENANT, history, drop_host=True, ttl_s=60).result(30)
    poison(engine)
    report = engine.warm(TENANT, history).result(30)
    assert report.device_tokens == report.restored_tokens == len(history) - 1
    second = generate(engine, history, SECOND)
    assert second.receipt.device_tokens == len(history) - 1
    assert second.reply == undisturbed(build_engine)[1].reply


def test_what_is_still_on_its_way_up_when_a_conversation_is_dropped_comes_to_no_tier(
    build_engine: EngineFactory, own_redis: RedisServer
) -> None:
    engine = build_engine(redis_url=own_redis.url, redis_timeout_s=30, restore_timeout_s=60)
    history = (*PROMPT, *generate(engine, (), PROMPT).reply)
    engine.park(TENANT, history, drop_host=True, ttl_s=60).result(30)
    own_redis.pause()
    warming = engine.warm(TENANT, history)
    while not engine._tiers.host.use().blocks:
        time.sleep(0.001)
    engine.drop(TENANT, history, with_redis=False).result(30)
    own_redis.resume()
    assert warming.result(30).device_tokens == 0
    located = engine.locate(TENANT, history, with_redis=False).result(30)
    assert (located.device_tokens, located.host_tokens) == (0, 0)
    engine.check()


def test_what_comes_up_while_redis_is_being_asked_to_delete_it_is_gone_with_it(
    build_engine: EngineFactory, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(redis_url=redis_url)
    history = (*PROMPT, *generate(engine, (), PROMPT).reply)
    engine.park(TENANT, history, drop_host=True, ttl_s=60).result(30)
    store = engine._tiers.store
    assert store is not None
    delete = store.delete

    def late(names: Sequence[BlockHash]) -> int:
        assert engine.warm(TENANT, history).result(30).restored_tokens == len(history) - 1
        return delete(names)

    monkeypatch.setattr(store, "delete", late)
    engine.drop(TENANT, history, with_redis=True).result(30)
    located = engine.locate(TENANT, history, with_redis=True).result(30)
    assert (located.device_tokens, located.host_tokens, located.redis_tokens) == (0, 0, 0)


def test_what_nobody_goes_on_from_is_found_on_the_device_and_goes_to_no_tier_below(
    build_engine: EngineFactory, redis_url: str
) -> None:
    engine = build_engine(redis_url=redis_url)
    history = (*PROMPT, *generate(engine, (), PROMPT, device_only=True).reply)
    engine.flush(TENANT, history).result(30)
    located = engine.locate(TENANT, history, with_redis=True).result(30)
    assert (located.device_tokens, located.host_tokens, located.redis_tokens) == (len(history) - 1, 0, 0)
    again = generate(engine, (), PROMPT)
    assert again.receipt.device_tokens == 48
    assert again.reply == history[len(PROMPT) :]


def test_tiers_are_told_apart_and_dropped_together(build_engine: EngineFactory, redis_url: str) -> None:
    engine = build_engine(redis_url=redis_url)
    history = (*PROMPT, *generate(engine, (), PROMPT).reply)
    kv = len(history) - 1
    engine.park(TENANT, history, drop_host=False, ttl_s=60).result(30)
    engine.warm(TENANT, history).result(30)
    located = engine.locate(TENANT, history, with_redis=True).result(30)
    assert (located.device_tokens, located.host_tokens, located.redis_tokens) == (kv, kv, kv)
    assert engine.retain(TENANT, history, ttl_s=0).result(30) == 4
    dropped = engine.drop(TENANT, history, with_redis=True).result(30)
    assert (dropped.device_blocks, dropped.host_blocks, dropped.redis_blocks) == (4, 4, 4)
    located = engine.locate(TENANT, history, with_redis=True).result(30)
    assert (located.device_tokens, located.host_tokens, located.redis_tokens) == (0, 0, 0)


def test_a_draining_engine_finishes_what_runs_and_takes_nothing_new(build_engine: EngineFactory) -> None:
    engine = build_engine()
    stream = start(engine, (), PROMPT, max_new_tokens=30)
    engine.drain(30)
    assert len(stream.result().reply) == 30
    with pytest.raises(Draining):
        start(engine, (), PROMPT)


def test_a_draining_engine_hands_over_what_waits_at_once_and_what_runs_when_its_time_is_over(
    build_engine: EngineFactory, redis_url: str
) -> None:
    engine, other = build_engine(redis_url=redis_url, max_running=1), build_engine(redis_url=redis_url)
    running = start(engine, (), PROMPT, max_new_tokens=3000)
    begun = [running.next()]
    waiting = start(engine, (), SECOND, max_new_tokens=1)
    began_s = time.monotonic()
    drained = Thread(target=engine.drain, args=(0.5,))
    drained.start()
    with pytest.raises(Draining):
        waiting.result()
    assert time.monotonic() - began_s < 0.4
    while isinstance(event := running.next(), Token):
        begun.append(event)
    assert isinstance(event, Failed)
    assert isinstance(event.error, Draining)
    assert time.monotonic() - began_s > 0.4
    drained.join()
    said = tuple(event.token_id for event in begun if isinstance(event, Token))
    poison(other)
    turn = generate(other, (), PROMPT, begun=said, max_new_tokens=len(said) + 8)
    assert turn.receipt.redis_tokens == len(PROMPT), "as many as the prompt has: more of it is the reply's"
    assert turn.reply == generate(other, (), (*PROMPT, *said), max_new_tokens=8).reply


def test_a_worker_that_closes_says_so_to_who_asks_for_a_history(build_engine: EngineFactory, redis_url: str) -> None:
    engine = build_engine(redis_url=redis_url)
    history = (*PROMPT, *generate(engine, (), PROMPT).reply)
    engine._histories.close()
    for asked in (engine.flush(TENANT, history), engine.park(TENANT, history, drop_host=False, ttl_s=60)):
        with pytest.raises(Draining, match="this worker is gone"):
            asked.result(10)


def test_a_step_that_fails_fails_its_requests_and_not_the_engine(build_engine: EngineFactory) -> None:
    engine = build_engine()
    runner = engine._stepper._runner

    class FailsOnce:
        def run(self, chunks: Sequence[Chunk]) -> torch.Tensor:
            engine._stepper._runner = runner
            raise RuntimeError("out of memory")

    engine._stepper._runner = FailsOnce()
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(engine, (), PROMPT)
    assert generate(engine, (), PROMPT).reply


def test_an_engine_whose_steps_all_fail_is_broken(build_engine: EngineFactory) -> None:
    engine = build_engine()
    runner = engine._stepper._runner

    class Fails:
        def run(self, chunks: Sequence[Chunk]) -> torch.Tensor:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def fail(times: int) -> None:
        engine._stepper._runner = Fails()
        for _ in range(times):
            with pytest.raises(RuntimeError, match="CUDA error"):
                generate(engine, (), PROMPT)
        engine._stepper._runner = runner

    fail(2)
    assert generate(engine, (), PROMPT).reply
    fail(2)
    assert not engine.broken.done(), "they were not one after another"
    fail(1)
    engine.broken.result(5)


def test_a_request_whose_logits_are_not_finite_fails_alone(build_engine: EngineFactory) -> None:
    engine = build_engine()
    runner = engine._stepper._runner

    class SpoilsTheFirstRowOnce:
        def run(self, chunks: Sequence[Chunk]) -> torch.Tensor:
            engine._stepper._runner = runner
            logits = runner.run(chunks).clone()
            logits[0] = torch.nan
            return logits

    alone = generate(engine, (), SECOND, max_new_tokens=200).reply
    first = start(engine, (), PROMPT, max_new_tokens=200)
    assert isinstance(first.next(), Token)
    second = start(engine, (), SECOND, max_new_tokens=200)
    assert isinstance(token := second.next(), Token)
    engine._stepper._runner = SpoilsTheFirstRowOnce()
    with pytest.raises(LogitsNotFinite):
        first.result()
    assert (token.token_id, *second.result().reply) == alone
