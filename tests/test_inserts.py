"""KV that was computed by itself and is inserted where it stands: what it comes to, and that no name lies about it."""

import random
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.inserts import _sides
from cache_store.errors import InvalidRequest
from cache_store.ids import BlockHash, full_block_hashes, root_hash
from cache_store.inserts import LINK_TOKENS, Inserts
from cache_store.redis_store import RedisBlockStore
from tests.engines import TENANT, EngineFactory, Turn, generate, poison, start
from tests.insert_reference import Reference
from worker.calls import Context, ContextPolicy, Sampling
from worker.engine.engine import Engine
from worker.engine.prefix import full_names
from worker.engine.request import Request

DOCUMENT = [(11 * place) % 300 + 5 for place in range(75)]
OTHER = [(17 * place) % 300 + 5 for place in range(64)]
BEFORE, BETWEEN, QUESTION = [7, 8, 9, 10, 11], [20, 21], [30, 31, 32]
TOP = Sampling(logprobs=20)
ROOT = root_hash(b"model", "tenant")

INPUT = [*BEFORE, *DOCUMENT, *BETWEEN, *OTHER, *QUESTION]
BOUNDS = (5, 80, 82, 146)


def prefill(engine: Engine, *texts: Sequence[int], codec: str = "raw", drop_host: bool = False) -> None:
    """As what belongs to no session: each by itself."""
    for text in texts:
        reply = generate(engine, (), text, max_new_tokens=1, codec=codec).reply
        if engine._tiers.store is not None:
            engine.park(TENANT, (*text, *reply), codec=codec, drop_host=drop_host, ttl_s=60).result(30)


def ask(engine: Engine, bounds: Sequence[int] = BOUNDS, **options: object) -> Turn:
    return start(engine, (), INPUT, insert_bounds=bounds, sampling=TOP, **options).result()  # type: ignore[arg-type]


def says(turn: Turn, engine: Engine, tokens: Sequence[int], bounds: tuple[int, ...]) -> None:
    """The reply's tokens are about as likely as by the reference."""
    loaded = engine._loaded
    assert loaded.rope is not None
    reference = Reference(loaded.model, loaded.rope, loaded.layout.num_layers)
    for number, token in enumerate(turn.tokens):
        likely = torch.log_softmax(reference.logits_after([*tokens, *turn.reply[:number]], Inserts(bounds)), -1)
        assert token.logprobs is not None
        said = torch.tensor([logprob for _, logprob in token.logprobs.top])
        wanted = likely[[token_id for token_id, _ in token.logprobs.top]]
        torch.testing.assert_close(said, wanted, atol=2e-3, rtol=0)


def test_a_question_sees_what_was_computed_by_itself_as_if_it_stood_there(build_engine: EngineFactory) -> None:
    engine = build_engine()
    plain = ask(engine, ())
    prefill(engine, DOCUMENT, OTHER)
    turn = ask(engine)
    says(turn, engine, INPUT, BOUNDS)
    says(plain, engine, INPUT, ())
    assert turn.receipt.insert_bounds == BOUNDS
    assert turn.receipt.device_tokens == 16 + len(DOCUMENT) + len(OTHER) - 2 * LINK_TOKENS  # with the first block
    assert turn.receipt.computed_tokens == len(INPUT) - turn.receipt.device_tokens
    logprobs = [[token.logprobs for token in each.tokens] for each in (turn, plain)]
    assert logprobs[0] != logprobs[1], "it is not what the conversation itself would have computed"


def test_it_comes_from_redis_alone_and_says_so(build_engine: EngineFactory, redis_url: str) -> None:
    warm = build_engine(redis_url=redis_url)
    prefill(warm, DOCUMENT, OTHER, drop_host=True)
    cold = build_engine(redis_url=redis_url)
    turn = ask(cold)
    assert turn.receipt.redis_tokens == len(DOCUMENT) + len(OTHER) - 2 * LINK_TOKENS
    assert turn.receipt.restored_bytes == 7 * cold.layout.block_bytes
    poison(warm)
    assert turn.reply == ask(warm).reply
    says(turn, cold, INPUT, BOUNDS)


def test_a_session_with_inserts_comes_back_from_redis_as_it_was(build_engine: EngineFactory, redis_url: str) -> None:
    engine = build_engine(redis_url=redis_url)
    prefill(engine, DOCUMENT, OTHER)
    history = (*INPUT, *ask(engine).reply)
    context = Context(insert_bounds=BOUNDS)
    parked = engine.park(TENANT, history, context=context, drop_host=True, ttl_s=60).result(30)
    assert parked.redis_tokens == len(history) - 1
    undisturbed = generate(engine, history, QUESTION, sampling=TOP, context=context)
    for resumed in (engine, build_engine(redis_url=redis_url)):
        resumed.park(TENANT, history, context=context, drop_host=True, ttl_s=60).result(30)
        poison(resumed)
        turn = generate(resumed, history, QUESTION, sampling=TOP, context=context)
        assert turn.receipt.redis_tokens == len(history) - 1
        assert turn.tokens == undisturbed.tokens
    says(undisturbed, engine, [*history, *QUESTION], BOUNDS)


def test_what_no_tier_has_is_computed_where_it_stands_under_the_names_of_any_conversation(
    build_engine: EngineFactory,
) -> None:
    engine = build_engine()
    prefill(engine, OTHER)
    turn = ask(engine)
    assert turn.receipt.insert_bounds == BOUNDS[2:]
    assert turn.receipt.device_tokens == len(OTHER) - LINK_TOKENS
    says(turn, engine, INPUT, BOUNDS[2:])
    history = (*INPUT, *turn.reply)
    held = engine.locate(TENANT, history, context=Context(insert_bounds=BOUNDS[2:]), with_redis=False).result(10)
    assert held.device_tokens == len(history) - 1
    as_asked = engine.locate(TENANT, history, context=Context(insert_bounds=BOUNDS), with_redis=False).result(10)
    assert as_asked.device_tokens == 16  # what is before anything that was to be inserted


def test_the_same_tokens_without_inserts_find_nothing_of_it(build_engine: EngineFactory) -> None:
    engine = build_engine()
    prefill(engine, DOCUMENT, OTHER)
    ask(engine)
    turn = ask(engine, ())
    assert turn.receipt.device_tokens == 16  # what is before anything that was inserted
    says(turn, engine, INPUT, ())


def test_a_history_whose_inserts_are_lost_is_computed_without_them(build_engine: EngineFactory) -> None:
    engine, other = build_engine(), build_engine()
    prefill(engine, DOCUMENT, OTHER)
    history = (*INPUT, *ask(engine).reply)
    turn = generate(other, history, QUESTION, sampling=TOP, context=Context(insert_bounds=BOUNDS))
    assert turn.receipt.insert_bounds == ()
    assert turn.receipt.computed_tokens == len(history) + len(QUESTION)
    says(turn, other, [*history, *QUESTION], ())


def test_one_block_lost_from_a_history_is_inserted_again(build_engine: EngineFactory) -> None:
    engine = build_engine(host_cache_bytes=0)
    prefill(engine, DOCUMENT, OTHER)
    history, context = (*INPUT, *ask(engine).reply), Context(insert_bounds=BOUNDS)
    undisturbed = generate(engine, history, QUESTION, sampling=TOP, context=context)
    name = engine._conversations.history(TENANT, history, "raw", context).names()[3]  # tokens 48 to 64, all inserted

    def lose() -> None:
        engine._pool.drop([name])

    engine._inbox.do(lose).result(10)
    poison(engine)
    turn = generate(engine, history, QUESTION, sampling=TOP, context=context)
    assert turn.reply == undisturbed.reply
    says(turn, engine, [*history, *QUESTION], BOUNDS)
    assert turn.receipt.computed_tokens == undisturbed.receipt.computed_tokens
    assert turn.receipt.insert_bounds == BOUNDS


def test_another_worker_goes_on_in_mid_reply_and_says_the_same(build_engine: EngineFactory, redis_url: str) -> None:
    engine = build_engine(redis_url=redis_url)
    prefill(engine, DOCUMENT, OTHER, drop_host=True)
    whole = ask(engine, max_new_tokens=12).reply
    rest = ask(build_engine(redis_url=redis_url), begun=whole[:5], max_new_tokens=12)
    assert whole[:5] + rest.reply == whole
    assert rest.receipt.insert_bounds == BOUNDS


def test_conversations_that_compete_for_a_small_device_say_the_same(
    build_engine: EngineFactory, redis_url: str
) -> None:
    roomy = build_engine()
    prefill(roomy, DOCUMENT, OTHER)
    alone = ask(roomy, max_new_tokens=40).reply
    small = build_engine(device_cache_bytes=26 * roomy.layout.block_bytes, redis_url=redis_url)
    prefill(small, DOCUMENT, OTHER)
    streams = [start(small, (), INPUT, insert_bounds=BOUNDS, max_new_tokens=40) for _ in range(4)]
    assert [stream.result().reply for stream in streams] == [alone] * 4


def test_a_device_without_room_to_read_what_is_inserted_computes_it(
    build_engine: EngineFactory, redis_url: str
) -> None:
    roomy = build_engine(redis_url=redis_url)
    prefill(roomy, DOCUMENT, OTHER, drop_host=True)
    full = build_engine(device_cache_bytes=10 * roomy.layout.block_bytes, redis_url=redis_url)
    turn = start(full, (), INPUT, insert_bounds=BOUNDS, max_new_tokens=8).result()
    assert turn.receipt.insert_bounds == ()
    assert turn.reply == start(build_engine(), (), INPUT, max_new_tokens=8).result().reply


def test_who_has_no_room_to_read_what_is_inserted_waits_for_others_to_end(
    build_engine: EngineFactory, redis_url: str
) -> None:
    roomy = build_engine(redis_url=redis_url)
    prefill(roomy, DOCUMENT, OTHER, drop_host=True)
    full = build_engine(device_cache_bytes=23 * roomy.layout.block_bytes, redis_url=redis_url)
    neighbour = start(full, (), range(5, 200), max_new_tokens=12)
    turn = start(full, (), INPUT, insert_bounds=BOUNDS, max_new_tokens=8)
    assert neighbour.result().receipt.computed_tokens == 195
    assert turn.result().receipt.insert_bounds == BOUNDS


def test_whatever_became_of_blocks_no_name_lies_about_what_is_inserted(build_engine: EngineFactory) -> None:
    sides = [(), BOUNDS[:2], BOUNDS[2:], BOUNDS]
    engine, draw = build_engine(), random.Random(8)
    prefill(engine, DOCUMENT, OTHER)
    alone = {side: start(engine, (), INPUT, insert_bounds=side).result().reply for side in sides}
    small = build_engine(device_cache_bytes=22 * engine.layout.block_bytes, host_cache_bytes=0)

    def lose(names: Sequence[BlockHash]) -> None:
        small._pool.drop(names)
        poison(small)

    heard: set[tuple[int, ...]] = set()
    for _ in range(60):
        prefill(small, *draw.sample([DOCUMENT, OTHER], draw.randint(0, 2)))
        crowd = [start(small, (), INPUT, insert_bounds=draw.choice(sides)) for _ in range(draw.randint(0, 2))]
        for stream in crowd:  # that compete, and hang up
            small.cancel(stream.request_id)
        turn = start(small, (), INPUT, insert_bounds=draw.choice(sides)).result()
        assert turn.reply == alone[turn.receipt.insert_bounds]
        heard.add(turn.receipt.insert_bounds)
        names = small._pool.names()
        small._inbox.do(partial(lose, draw.sample(names, min(3, len(names))))).result(10)
    assert heard == {*sides}


def test_a_store_that_fails_costs_the_computing_and_no_turn(
    build_engine: EngineFactory, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(redis_url=redis_url)
    prefill(engine, DOCUMENT, OTHER, drop_host=True)

    def fails(*args: object, **options: object) -> None:
        raise OSError("the store is not well")

    monkeypatch.setattr(RedisBlockStore, "get", fails)
    turn = ask(engine)
    assert turn.receipt.insert_bounds == ()
    says(turn, engine, INPUT, ())


def test_what_is_found_is_not_expected_to_be_inserted_as_well(build_engine: EngineFactory) -> None:
    engine = build_engine()
    prefill(engine, DOCUMENT, OTHER)
    expected: list[int] = []
    add = engine._scheduler.add

    def noted(request: Request) -> None:
        add(request)
        expected.append(request.expected_tokens)

    engine._scheduler.add = noted  # type: ignore[method-assign]
    computed = [ask(engine).receipt.computed_tokens for _ in range(3)]
    assert expected == computed == [42, 3, 3]


@pytest.mark.parametrize("codec", ["lossless", "int8", "k8v4"])
def test_sessions_of_each_codec_insert_what_was_computed_for_it(
    build_engine: EngineFactory, redis_url: str, codec: str
) -> None:
    engine = build_engine(redis_url=redis_url)
    prefill(engine, DOCUMENT, OTHER, codec=codec, drop_host=True)
    turn = ask(engine, codec=codec)
    assert turn.receipt.redis_tokens == len(DOCUMENT) + len(OTHER) - 2 * LINK_TOKENS
    history, context = (*INPUT, *turn.reply), Context(insert_bounds=BOUNDS)
    engine.park(TENANT, history, codec=codec, context=context, drop_host=True, ttl_s=60).result(30)
    other = build_engine(redis_url=redis_url)
    again = generate(other, history, QUESTION, codec=codec, context=context)
    assert again.receipt.insert_bounds == BOUNDS  # what is lossy is not encoded twice: it is inserted again
    assert again.receipt.redis_tokens >= len(DOCUMENT) + len(OTHER) - 2 * LINK_TOKENS


def test_a_turn_with_inserts_is_not_audited_from_tokens_alone(build_engine: EngineFactory, redis_url: str) -> None:
    engine = build_engine(redis_url=redis_url)
    prefill(engine, DOCUMENT, OTHER)
    history, context = (*INPUT, *ask(engine).reply), Context(insert_bounds=BOUNDS)
    engine.park(TENANT, history, context=context, drop_host=True, ttl_s=60).result(30)
    turn = generate(engine, history, QUESTION, context=context, audit=True)
    assert turn.receipt.redis_tokens > 0
    assert turn.receipt.audit is None


def test_the_benchmark_times_what_it_says(build_engine: EngineFactory, redis_url: str) -> None:
    engine = build_engine(redis_url=redis_url)
    for side in _sides(engine, 3, 40, 8).values():
        assert side() > 0
    sources = engine.stats()
    assert sources.redis_tokens == sources.host_tokens == sources.device_tokens == 3 * (40 - LINK_TOKENS)


@given(st.lists(st.integers(1, 70), max_size=9), st.integers(0, 400))
def test_names_are_shared_exactly_where_the_same_was_inserted(lengths: list[int], cut: int) -> None:
    edges = [sum(lengths[: number + 1]) for number in range(len(lengths) // 2 * 2)]
    inserts, tokens = Inserts(tuple(edges)), list(range(400))
    plain = list(full_block_hashes(ROOT, tokens, 16))
    names = full_names(ROOT, tokens, 16, inserts)
    first = next((insert.linked for insert in inserts.all), 400)
    assert names[: first // 16] == plain[: first // 16]
    assert not set(names[first // 16 :]) & set(plain)
    shorter = full_names(ROOT, tokens[:cut], 16, inserts)
    assert shorter == names[: cut // 16]
    if inserts.all:
        last = inserts.all[-1]
        others = full_names(ROOT, tokens, 16, inserts.without([last]))
        assert others[: last.linked // 16] == names[: last.linked // 16]
        assert not set(others[last.linked // 16 :]) & set(names)


@pytest.mark.parametrize("bounds", [(0,), (4, 9), (50, 40), (10, 85), (81, 82)])
def test_bounds_that_are_none_of_the_input_are_refused(build_engine: EngineFactory, bounds: tuple[int, ...]) -> None:
    engine = build_engine()
    with pytest.raises(InvalidRequest, match="insert_bounds"):
        start(engine, DOCUMENT[:5], DOCUMENT, insert_bounds=bounds)
    with pytest.raises(InvalidRequest, match="insert_bounds"):
        Context(ContextPolicy.WINDOW, (0, 10), (0, 40)).check(100)
