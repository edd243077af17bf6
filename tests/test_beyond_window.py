"""Conversations longer than the model's window: what they attend to, and that it is the same however it came about."""

import time
from collections.abc import Sequence
from itertools import count
from threading import Event
from typing import Any

import pytest
import torch

from tests.beyond_reference import Reference
from tests.engines import TENANT, EngineFactory, Turn, poison, start
from worker.calls import Context, ContextPolicy, Sampling, Token
from worker.engine.engine import Engine
from worker.engine.epochs import Beyond
from worker.engine.request import Request
from worker.engine.sampler import RowState
from worker.errors import TenantErased
from worker.ids import BlockId
from worker.tiers.coder import BlockCoder

POLICIES = [ContextPolicy.WINDOW, ContextPolicy.RECALL]
LONG = tuple((index * 37 + index // 7) % 500 + 5 for index in range(2000))
TOP = Sampling(logprobs=20)


def build(build_engine: EngineFactory, **settings: object) -> Engine:
    return build_engine(context_tokens=208, recall_tokens=48, **settings)


class Talk:
    """A conversation with a policy, turn by turn."""

    def __init__(self, policy: ContextPolicy, codec: str = "raw") -> None:
        self.policy = policy
        self.codec = codec
        self.history: list[int] = []
        self.bounds: list[int] = []
        self.turns: list[Turn] = []

    @property
    def context(self) -> Context:
        return Context(self.policy, tuple(self.bounds))

    def say(self, engine: Engine, tokens: Sequence[int], num: int = 8) -> Turn:
        turn = start(
            engine, self.history, tokens, max_new_tokens=num, context=self.context, codec=self.codec, sampling=TOP
        ).result()
        self.bounds += [len(self.history), len(self.history) + len(tokens)]
        self.history += [*tokens, *turn.reply]
        self.turns.append(turn)
        return turn

    def park(self, engine: Engine) -> None:
        parked = engine.park(
            TENANT, self.history, codec=self.codec, context=self.context, drop_host=True, ttl_s=60
        ).result(30)
        assert parked.redis_tokens == len(self.history) - 1
        poison(engine)

    def follows(self, reference: Reference, since: int = 0) -> None:
        """Each token of the turns from `since` on is the likeliest, by about the reference's logits."""
        for number, turn in enumerate(self.turns[since:], since):
            bounds = tuple(self.bounds[: 2 * number + 2])
            for at, token in enumerate(turn.tokens, bounds[-1]):
                logits = reference.logits_after(self.history[:at], bounds)
                likely = torch.log_softmax(logits, -1)
                assert token.logprobs is not None
                said = torch.tensor([logprob for _, logprob in token.logprobs.top])
                torch.testing.assert_close(
                    said, likely[[token_id for token_id, _ in token.logprobs.top]], atol=2e-3, rtol=0
                )


def reference_of(engine: Engine, policy: ContextPolicy) -> Reference:
    loaded = engine._loaded
    assert loaded.rope is not None
    return Reference(
        loaded.model, loaded.rope, Beyond(engine._conversations.policies[policy]), loaded.layout.num_layers
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("num_input", "num_reply"), [(50, 20), (350, 9)])
def test_a_conversation_beyond_its_window_attends_to_what_its_policy_says(
    build_engine: EngineFactory, policy: ContextPolicy, num_input: int, num_reply: int
) -> None:
    engine, talk = build(build_engine), Talk(policy)
    for at in range(0, 350, num_input + num_reply):
        talk.say(engine, LONG[at : at + num_input], num_reply)
    reference = reference_of(engine, policy)
    talk.follows(reference)
    assert (reference.num_asked > 3) == (policy is ContextPolicy.RECALL)


def talk_of(engine: Engine, policy: ContextPolicy, turns: int = 6, *, parks: bool = False) -> Talk:
    talk = Talk(policy)
    for number in range(turns):
        talk.say(engine, LONG[number * 70 : number * 70 + 70], 20)
        if parks:
            talk.park(engine)
    return talk


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> ContextPolicy:
    chosen: ContextPolicy = request.param
    return chosen


def test_a_conversation_beyond_its_window_comes_back_from_redis_as_it_was(
    build_engine: EngineFactory, redis_url: str, policy: ContextPolicy
) -> None:
    undisturbed = talk_of(build(build_engine), policy)
    parked = talk_of(build(build_engine, redis_url=redis_url), policy, parks=True)
    assert parked.history == undisturbed.history
    assert parked.turns[-1].receipt.redis_tokens > 0


def test_another_worker_goes_on_with_it_from_redis_alone(
    build_engine: EngineFactory, redis_url: str, policy: ContextPolicy
) -> None:
    undisturbed = talk_of(build(build_engine), policy)
    talk = Talk(policy)
    for number in range(6):
        engine = build(build_engine, redis_url=redis_url)
        talk.say(engine, LONG[number * 70 : number * 70 + 70], 20)
        engine.park(TENANT, talk.history, context=talk.context, drop_host=True, ttl_s=60).result(30)
        engine.check()
        engine.close()
    assert talk.history == undisturbed.history


def test_a_receipt_counts_the_bytes_that_came_back_in_the_course_of_the_turn(
    build_engine: EngineFactory, redis_url: str
) -> None:
    engine = build(build_engine, redis_url=redis_url)
    talk = talk_of(engine, ContextPolicy.RECALL, 8)
    talk.park(engine)
    small = build(build_engine, device_cache_bytes=30 * engine.layout.block_bytes, redis_url=redis_url)
    receipt = talk.say(small, LONG[900:960], 20).receipt
    moved = sum(moved.bytes for moved in small.stats().moved if moved.target == "device")
    assert receipt.restored_bytes == moved > len(talk.history) // 16 * engine.layout.block_bytes


@pytest.mark.parametrize("num_begun", [1, 20])
def test_another_worker_goes_on_in_mid_reply_and_says_the_same(
    build_engine: EngineFactory, redis_url: str, policy: ContextPolicy, num_begun: int
) -> None:
    engine = build(build_engine, redis_url=redis_url)
    talk = talk_of(engine, policy)
    talk.park(engine)
    whole = start(engine, talk.history, LONG[900:960], max_new_tokens=30, context=talk.context).result()
    other = build(build_engine, redis_url=redis_url)
    rest = start(
        other,
        talk.history,
        LONG[900:960],
        begun=whole.reply[:num_begun],
        max_new_tokens=30,
        context=talk.context,
    ).result()
    assert whole.reply[:num_begun] + rest.reply == whole.reply


@pytest.mark.parametrize("lost", [0, 11, -3])
def test_what_was_lost_from_every_tier_is_computed_again(
    build_engine: EngineFactory, policy: ContextPolicy, lost: int
) -> None:
    engine = build(build_engine)
    talk = talk_of(engine, policy)
    whole = start(engine, talk.history, LONG[900:960], max_new_tokens=20, context=talk.context).result()
    names = engine._conversations.history(TENANT, talk.history, "raw", talk.context).names()
    assert len(names) > 25
    name = names[lost]

    def lose() -> None:
        engine._pool.drop([name])
        engine._tiers.write_behind.forget([name])

    engine._inbox.do(lose).result(10)
    poison(engine)
    again = start(engine, talk.history, LONG[900:960], max_new_tokens=20, context=talk.context).result()
    assert again.reply == whole.reply


@pytest.mark.parametrize("num_begun", [0, 15])
def test_a_block_is_published_once_all_of_it_is_computed(
    build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch, num_begun: int
) -> None:
    engine = build_engine(context_tokens=512, recall_tokens=48)
    talk = talk_of(engine, ContextPolicy.RECALL)
    assert len(talk.history) > engine._conversations.policies[ContextPolicy.RECALL].reach
    reply = start(engine, talk.history, LONG[900:1005], max_new_tokens=30, context=talk.context).result().reply
    device, tables = engine._tiers.device, engine._scheduler._tables
    published: list[tuple[BlockId, torch.Tensor]] = []
    seal = tables.seal

    def noted(request: Request, index: int) -> None:
        block = request.block_of(index)
        published.append((block, device.view(block).clone()))
        seal(request, index)

    monkeypatch.setattr(tables, "seal", noted)
    new = LONG[910:1015]  # its last tokens, which choose what is recalled, begin within a block
    start(engine, talk.history, new, begun=reply[:num_begun], max_new_tokens=30, context=talk.context).result()
    assert len(published) > 5
    for block, content in published:
        torch.testing.assert_close(content, device.view(block), atol=0, rtol=0)


def test_conversations_that_compete_for_a_small_device_say_the_same(
    build_engine: EngineFactory, redis_url: str, policy: ContextPolicy
) -> None:
    roomy = build(build_engine)
    block_bytes = roomy.layout.block_bytes
    small = build(build_engine, device_cache_bytes=40 * block_bytes, redis_url=redis_url)
    alone, crowded = [Talk(policy) for _ in range(3)], [Talk(policy) for _ in range(3)]
    for number in range(4):
        new = [LONG[700 * which + number * 90 :][:90] for which in range(3)]
        for talk, tokens in zip(alone, new, strict=True):
            talk.say(roomy, tokens, 25)
        streams = [
            start(small, talk.history, tokens, max_new_tokens=25, context=talk.context)
            for talk, tokens in zip(crowded, new, strict=True)
        ]
        for talk, tokens, stream in zip(crowded, new, streams, strict=True):
            reply = stream.result().reply
            talk.bounds += [len(talk.history), len(talk.history) + len(tokens)]
            talk.history += [*tokens, *reply]
    assert [talk.history for talk in crowded] == [talk.history for talk in alone]


def test_an_erased_tenants_keys_are_kept_in_no_form(build_engine: EngineFactory) -> None:
    engine = build(build_engine)
    talk_of(engine, ContextPolicy.RECALL)
    kept = engine._histories._representatives
    assert kept._kept
    engine.erase("somebody else", with_redis=False).result(10)
    assert kept._kept
    engine.erase(TENANT, with_redis=False).result(10)
    assert not kept._kept
    assert kept._num_bytes == 0


def test_what_is_being_recalled_while_its_tenant_is_erased_arrives_nowhere(
    build_engine: EngineFactory, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(build_engine, redis_url=redis_url)
    talk = talk_of(engine, ContextPolicy.RECALL)
    talk.park(engine)
    writing, may_write, decode, gatherer = Event(), Event(), BlockCoder.decode, engine._scheduler._gatherer
    assert gatherer is not None

    def decode_late(coder: BlockCoder, *block: Any) -> None:
        if gatherer.is_busy:  # not what the turn begins with
            writing.set()
            may_write.wait(30)
        decode(coder, *block)

    monkeypatch.setattr(BlockCoder, "decode", decode_late)
    turn = start(engine, talk.history, LONG[900:960], context=talk.context)
    assert writing.wait(30)
    erased = engine.erase(TENANT, with_redis=False)
    with pytest.raises(TenantErased):
        turn.result()
    may_write.set()
    erased.result(10)
    give_up = time.monotonic() + 10
    while gatherer.is_busy:
        assert time.monotonic() < give_up, "it is still being written"
        time.sleep(0.01)
    assert engine.blocks_held().result(10).device == []


def test_a_turn_that_leaves_its_window_is_not_audited(
    build_engine: EngineFactory, redis_url: str, policy: ContextPolicy
) -> None:
    engine, talk = build(build_engine, redis_url=redis_url), Talk(policy)
    reach = engine._conversations.policies[policy].reach
    talk.say(engine, LONG[: reach - 60], 20)
    talk.park(engine)
    crossing = start(engine, talk.history, LONG[:5], max_new_tokens=60, context=talk.context, audit=True).result()
    assert crossing.receipt.redis_tokens > 0
    assert crossing.receipt.audit is None
    assert engine.stats().audits == {"passed": 0, "mismatched": 0, "skipped": 1}


def test_what_has_left_the_window_takes_no_room_in_the_queue(build_engine: EngineFactory) -> None:
    engine, talk = build(build_engine, max_running=1, max_waiting_tokens=700), Talk(ContextPolicy.WINDOW)
    for at in range(0, 1200, 300):
        talk.say(engine, LONG[at : at + 300])
    streams = [
        start(engine, talk.history, LONG[:20], max_new_tokens=20, context=talk.context) for _ in range(3)
    ]  # two of them wait
    assert len({stream.result().reply for stream in streams}) == 1


@pytest.mark.parametrize("failing", [1, 4, 9])
def test_a_step_that_fails_beyond_the_window_is_as_if_it_had_not(build_engine: EngineFactory, failing: int) -> None:
    engine = build(build_engine)
    talk = talk_of(engine, ContextPolicy.RECALL)

    def both() -> list[tuple[int, ...]]:
        streams = [start(engine, talk.history, LONG[at : at + 60], context=talk.context) for at in (900, 980)]
        return [stream.result().reply for stream in streams]

    undisturbed = both()
    sample, calls = engine._sampler.sample, count(1)

    def fails_once(logits: torch.Tensor, rows: Sequence[RowState]) -> list[Token]:
        if next(calls) == failing:
            raise RuntimeError("the accelerator is not well")
        return sample(logits, rows)

    engine._sampler.sample = fails_once  # type: ignore[method-assign]
    assert both() == undisturbed
    assert next(calls) > failing + 1


def test_two_that_begin_alike_and_ask_different_things_share_no_kv_that_depends_on_it(
    build_engine: EngineFactory,
) -> None:
    engine = build(build_engine)
    talk, other = talk_of(engine, ContextPolicy.RECALL), Talk(ContextPolicy.RECALL)
    other.history, other.bounds, other.turns = [*talk.history], [*talk.bounds], [*talk.turns]
    other.say(engine, [*LONG[900:925], *LONG[30:54]])  # what its last tokens recall, all of its question has seen
    talk.say(engine, [*LONG[900:925], *LONG[1300:1324]])
    talk.say(engine, LONG[1500:1520])
    talk.follows(reference_of(engine, ContextPolicy.RECALL))
