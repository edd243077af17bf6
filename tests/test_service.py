"""The front end as clients see it, over real gRPC, with workers that a test can break."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cache_store.embedded_redis import RedisServer
from cache_store.errors import SessionBusy
from cache_store.records import TurnRecord
from protos import rekindle_pb2 as pb
from server.app import Application
from server.directory import StaticAddresses
from tests.fake_worker import FrontEnd, details_of, detokenize, field_of, front_end, reply_to, tokenize
from worker.errors import ContextTooLong, DeadlineUnmeetable, Draining, Overloaded

RpcError = grpc.aio.AioRpcError


@pytest.fixture
async def front() -> AsyncIterator[FrontEnd]:
    async with front_end() as front:
        yield front


def other_than(front: FrontEnd, worker_id: str) -> str:
    return next(other for other in front.workers if other != worker_id)


async def eventually(check: Any, within_s: float = 5.0) -> None:
    give_up = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < give_up, "did not happen in time"
        await asyncio.sleep(0.01)


async def test_a_turn_streams_deltas_and_then_says_that_it_is_finished(front: FrontEnd) -> None:
    reply = await front.turn("hello", max_new_tokens=5)
    assert reply.token_ids == reply_to(tokenize("hello"), 5)
    assert reply.text == detokenize(reply.token_ids)
    assert (reply.finished.usage.prompt_tokens, reply.finished.usage.completion_tokens) == (5, 5)
    assert (reply.finished.turn, reply.finished.seed) == (0, 7)


async def test_turns_of_a_session_continue_its_history(front: FrontEnd) -> None:
    await front.new_session()
    first = await front.turn("one", "s")
    second = await front.turn("two", "s")
    history = [*tokenize("one"), *first.token_ids, *tokenize("two")]
    assert second.token_ids == reply_to(history, 8)
    assert (first.finished.turn, second.finished.turn) == (1, 2)
    session = await front.session(with_token_ids=True, with_text=True)
    assert list(session.token_ids) == [*history, *second.token_ids]
    assert session.text == detokenize(session.token_ids)
    assert [(turn.number, turn.start, turn.reply_start, turn.end) for turn in session.turns] == [
        (1, 0, 3, 11),
        (2, 11, 14, 22),
    ]
    assert session.turns[0].reason == pb.FINISH_REASON_LENGTH
    assert (session.version, session.model, session.num_tokens) == (2, "f00d", 22)


async def test_a_session_returns_to_the_worker_that_has_it_hot(front: FrontEnd) -> None:
    await front.new_session()
    receipts = [(await front.turn(f"turn {number}", "s")).finished.receipt for number in range(3)]
    assert len({receipt.worker_id for receipt in receipts}) == 1
    assert receipts[2].device_tokens > receipts[1].device_tokens > 0


async def test_chat_and_tokens_reach_the_worker_as_they_are(front: FrontEnd) -> None:
    chat = pb.ChatInput(messages=[pb.ChatMessage(role="user", content="hi")])
    sampling = pb.Sampling(temperature=0.5, seed=3, max_new_tokens=1, stop=["x"])
    for request in (
        pb.GenerateRequest(chat=chat, sampling=sampling),
        pb.GenerateRequest(tokens=pb.TokenInput(token_ids=[1, 2, 2**31 - 1]), sampling=sampling),
    ):
        assert [response async for response in front.inference.Generate(request)]
    seen = [request for worker in front.workers.values() for request in worker.generated]
    assert {request.WhichOneof("input") for request in seen} == {"chat", "tokens"}
    assert all(request.sampling == sampling for request in seen)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GenerateRequest(), "input"),
        (pb.GenerateRequest(text=""), "text"),
        (pb.GenerateRequest(chat=pb.ChatInput()), "chat.messages"),
        (pb.GenerateRequest(chat=pb.ChatInput(messages=[pb.ChatMessage(content="x")])), "chat.messages[0].role"),
        (pb.GenerateRequest(tokens=pb.TokenInput()), "tokens.token_ids"),
        (pb.GenerateRequest(tokens=pb.TokenInput(token_ids=[1, 2**31])), "tokens.token_ids[1]"),
        (pb.GenerateRequest(text="x", session_id="no spaces"), "session_id"),
        (pb.GenerateRequest(text="x", sampling=pb.Sampling(max_new_tokens=0)), "sampling.max_new_tokens"),
        (pb.GenerateRequest(text="x", sampling=pb.Sampling(logprobs=21)), "sampling.logprobs"),
        (pb.GenerateRequest(text="x", sampling=pb.Sampling(stop=["a", ""])), "sampling.stop[1]"),
        (pb.GenerateRequest(text="x", sampling=pb.Sampling(stop=["a"] * 17)), "sampling.stop"),
        (
            pb.GenerateRequest(text="x", sampling=pb.Sampling(stop_token_ids=[2**32 - 1])),
            "sampling.stop_token_ids[0]",
        ),
    ],
)
async def test_a_bad_request_is_refused_by_field_and_reaches_no_worker(
    front: FrontEnd, request_: pb.GenerateRequest, field: str
) -> None:
    with pytest.raises(RpcError) as caught:
        assert [response async for response in front.inference.Generate(request_)]
    assert caught.value.code() == StatusCode.INVALID_ARGUMENT
    assert field_of(caught.value) == field
    assert not any(worker.generated for worker in front.workers.values())


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("CreateSession", pb.CreateSessionRequest(session_id="{x}"), "session_id"),
        ("CreateSession", pb.CreateSessionRequest(ttl_s=2**63), "ttl_s"),
        ("GetSession", pb.GetSessionRequest(), "session_id"),
        ("ListSessions", pb.ListSessionsRequest(page_size=1001), "page_size"),
        ("ListSessions", pb.ListSessionsRequest(page_token="x"), "page_token"),
        ("UpdateSession", pb.UpdateSessionRequest(session_id="s", ttl_s=2**64 - 1), "ttl_s"),
        ("ForkSession", pb.ForkSessionRequest(session_id="s", new_session_id="?"), "new_session_id"),
        ("ForkSession", pb.ForkSessionRequest(session_id="s", at_turn=1), "at_turn"),
        ("ParkSession", pb.ParkSessionRequest(session_id="a" * 129), "session_id"),
    ],
)
async def test_a_bad_session_request_is_refused_by_field(
    front: FrontEnd, method: str, request_: Any, field: str
) -> None:
    await front.new_session()
    with pytest.raises(RpcError) as caught:
        await getattr(front.sessions, method)(request_)
    assert caught.value.code() == StatusCode.INVALID_ARGUMENT
    assert field_of(caught.value) == field


async def test_a_message_that_is_none_and_one_whose_error_would_quote_too_much_are_refused_as_invalid(
    front: FrontEnd,
) -> None:
    raw: Any = front.channel.unary_unary("/rekindle.v1.Sessions/CreateSession", None, None)
    for message in (b"\xff\xff", pb.CreateSessionRequest(codec="\U0001f389" * 3000).SerializeToString()):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw(message)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert field_of(caught.value) in ("request", "codec")


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("GetSession", pb.GetSessionRequest),
        ("UpdateSession", pb.UpdateSessionRequest),
        ("ForkSession", pb.ForkSessionRequest),
        ("ParkSession", pb.ParkSessionRequest),
        ("WarmSession", pb.WarmSessionRequest),
        ("DeleteSession", pb.DeleteSessionRequest),
    ],
)
async def test_an_unknown_session_is_not_found(front: FrontEnd, method: str, kind: Any) -> None:
    with pytest.raises(RpcError) as caught:
        await getattr(front.sessions, method)(kind(session_id="unknown"))
    assert caught.value.code() == StatusCode.NOT_FOUND
    with pytest.raises(RpcError) as caught:
        await front.turn("x", "unknown")
    assert caught.value.code() == StatusCode.NOT_FOUND
    assert [detail.reason for detail in details_of(caught.value)] == ["SESSION_NOT_FOUND"]


async def test_a_taken_session_id_already_exists(front: FrontEnd) -> None:
    await front.new_session("s")
    with pytest.raises(RpcError) as caught:
        await front.new_session("s")
    assert caught.value.code() == StatusCode.ALREADY_EXISTS


async def test_of_two_turns_at_once_the_second_is_aborted(front: FrontEnd) -> None:
    await front.new_session()
    for worker in front.workers.values():
        worker.pause_s = 0.05
    first = asyncio.create_task(front.turn("one", "s"))
    await eventually(lambda: any(worker.generated for worker in front.workers.values()))
    for call in (front.turn("two", "s"), front.sessions.DeleteSession(pb.DeleteSessionRequest(session_id="s"))):
        with pytest.raises(RpcError) as caught:
            await call
        assert caught.value.code() == StatusCode.ABORTED
    assert (await first).finished.turn == 1
    assert (await front.turn("three", "s")).finished.turn == 2


async def test_a_turn_is_committed_before_its_client_hears_that_it_is_finished(front: FrontEnd) -> None:
    await front.new_session()
    async for response in front.inference.Generate(pb.GenerateRequest(session_id="s", text="x")):
        if response.WhichOneof("event") == "finished":
            assert (await front.session()).version == 1


async def test_a_worker_that_refuses_is_quoted_and_nothing_is_stored(front: FrontEnd) -> None:
    await front.new_session()
    for worker in front.workers.values():
        worker.refuse_with = ContextTooLong("5000 tokens of prompt and 8 of reply exceed 4096")
    with pytest.raises(RpcError) as caught:
        await front.turn("x", "s")
    assert caught.value.code() == StatusCode.OUT_OF_RANGE
    assert caught.value.details() == "5000 tokens of prompt and 8 of reply exceed 4096"
    assert [detail.reason for detail in details_of(caught.value)] == ["CONTEXT_TOO_LONG"]
    assert sum(len(worker.generated) for worker in front.workers.values()) == 1  # no other would serve it either
    assert (await front.session()).version == 0
    for worker in front.workers.values():
        worker.refuse_with = None
    assert (await front.turn("x", "s")).finished.turn == 1  # and the session is free


@pytest.mark.parametrize("refusal", [Draining("leaving"), Overloaded("256 wait", 2.5), DeadlineUnmeetable("late")])
async def test_a_worker_without_room_passes_the_turn_to_another(front: FrontEnd, refusal: Exception) -> None:
    await front.new_session()
    home = (await front.turn("one", "s")).finished.receipt.worker_id
    front.workers[home].refuse_with = refusal
    assert (await front.turn("two", "s")).finished.receipt.worker_id == other_than(front, home)


async def test_when_all_are_full_the_client_is_told_when_to_come_back(front: FrontEnd) -> None:
    for worker in front.workers.values():
        worker.refuse_with = Overloaded("256 requests wait already", 2.5)
    with pytest.raises(RpcError) as caught:
        await front.turn()
    assert caught.value.code() == StatusCode.RESOURCE_EXHAUSTED
    delays = [
        detail.retry_delay.ToNanoseconds() for detail in details_of(caught.value) if hasattr(detail, "retry_delay")
    ]
    assert delays == [2_500_000_000]


async def test_a_bug_in_a_worker_shows_the_client_only_a_request_id(front: FrontEnd) -> None:
    for worker in front.workers.values():
        worker.refuse_with = RuntimeError("secret path /etc/shadow")
    with pytest.raises(RpcError) as caught:
        await front.turn()
    assert caught.value.code() == StatusCode.INTERNAL
    assert (caught.value.details() or "").startswith("internal error; request ")


async def test_a_worker_that_miscounts_its_tokens_is_not_believed(front: FrontEnd) -> None:
    await front.new_session()
    for worker in front.workers.values():
        worker.miscount = 1
    with pytest.raises(RpcError) as caught:
        await front.turn("x", "s")
    assert caught.value.code() == StatusCode.INTERNAL
    assert (await front.session()).version == 0


async def test_a_dead_worker_is_not_noticed_by_the_next_turn(front: FrontEnd) -> None:
    await front.new_session()
    first = await front.turn("one", "s")
    home = first.finished.receipt.worker_id
    await front.kill(home)
    second = await front.turn("two", "s")
    assert second.finished.receipt.worker_id == other_than(front, home)
    assert second.token_ids == reply_to([*tokenize("one"), *first.token_ids, *tokenize("two")], 8)


async def test_a_worker_lost_before_its_first_token_is_replaced_unseen(front: FrontEnd) -> None:
    await front.new_session()
    home = (await front.turn("one", "s")).finished.receipt.worker_id
    front.workers[home].pause_s = 30.0
    turn = asyncio.create_task(front.turn("two", "s"))
    await eventually(lambda: len(front.workers[home].generated) == 2)
    await front.kill(home)
    assert (await turn).finished.receipt.worker_id == other_than(front, home)
    assert (await front.session()).version == 2


async def test_a_worker_that_comes_back_is_used_again(front: FrontEnd) -> None:
    for worker_id in front.workers:
        await front.kill(worker_id)
    await eventually(lambda: not front.app.directory.living())
    with pytest.raises(RpcError) as caught:
        await front.turn()
    assert caught.value.code() == StatusCode.UNAVAILABLE
    await front.workers["1"].start()
    await front.app.directory.wait_for_workers(1, timeout_s=5)
    assert (await front.turn()).finished.receipt.worker_id == "1"


async def test_moving_to_another_worker_first_flushes_the_last(front: FrontEnd) -> None:
    await front.new_session()
    home = (await front.turn("one", "s")).finished.receipt.worker_id
    front.workers[home].accepting = False
    await eventually(lambda: not front.app.directory.known()[int(home)].accepting)
    second = await front.turn("two", "s")
    assert "flush" in front.workers[home].calls
    assert second.finished.receipt.redis_tokens == 11  # what the last worker had is there


async def test_a_last_worker_that_does_not_flush_is_not_waited_for_long() -> None:
    async with front_end(flush_timeout_s=0.2) as front:
        await front.new_session()
        home = (await front.turn("one", "s")).finished.receipt.worker_id
        front.workers[home].hold_flush_s = 30.0
        front.workers[home].accepting = False
        await eventually(lambda: not front.app.directory.known()[int(home)].accepting)
        began = time.monotonic()
        await front.turn("two", "s")
        assert time.monotonic() - began < 2.0


async def test_a_client_that_hangs_up_stops_the_worker_and_frees_the_session(front: FrontEnd) -> None:
    await front.new_session()
    for worker in front.workers.values():
        worker.pause_s = 0.02
    call = front.inference.Generate(
        pb.GenerateRequest(session_id="s", text="x", sampling=pb.Sampling(max_new_tokens=10_000))
    )
    assert (await call.read()).WhichOneof("event") == "delta"
    call.cancel()
    await eventually(lambda: sum(worker.cancelled for worker in front.workers.values()) == 1, within_s=1.0)
    assert (await front.turn("y", "s")).finished.turn == 1  # nothing was stored, nothing is locked


async def test_a_deadline_stops_the_worker_and_frees_the_session(front: FrontEnd) -> None:
    await front.new_session()
    for worker in front.workers.values():
        worker.pause_s = 0.02
    request = pb.GenerateRequest(session_id="s", text="x", sampling=pb.Sampling(max_new_tokens=10_000))
    with pytest.raises(RpcError) as caught:
        assert [response async for response in front.inference.Generate(request, timeout=0.3)]
    assert caught.value.code() == StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: sum(worker.cancelled for worker in front.workers.values()) == 1, within_s=1.0)
    assert (await front.turn("y", "s")).finished.turn == 1


async def test_a_turn_longer_than_its_lease_keeps_it() -> None:
    async with front_end(lease_s=0.3, redis_timeout_s=0.05) as front:
        await front.new_session()
        for worker in front.workers.values():
            worker.pause_s = 0.1
        turn = asyncio.create_task(front.turn("x", "s", max_new_tokens=10))
        await asyncio.sleep(0.6)
        with pytest.raises(RpcError):
            await front.turn("y", "s")
        assert (await turn).finished.turn == 1


async def test_a_session_that_a_dead_front_end_holds_is_taken_from_it() -> None:
    async with front_end() as front:
        await front.new_session()
        records = front.app._records
        await records.keep_alive("other", 10)
        before = await records.begin("default", "s", holder="other/call", lease_s=600)
        with pytest.raises(RpcError) as caught:
            await front.turn("x", "s")
        assert caught.value.code() == StatusCode.ABORTED, "it lives"
        await records.keep_alive("other", 0)
        assert (await front.turn("y", "s")).finished.turn == 1
        done = TurnRecord(start=0, reply_start=1, end=1, finish_reason=1, committed_ms=0)
        with pytest.raises(SessionBusy):  # it was only frozen
            await records.commit(before, holder="other/call", new_tokens=[1], turn=done, model="", worker_id="")


async def test_a_running_front_end_is_alive_and_one_that_has_closed_is_not() -> None:
    async with front_end() as front:
        name, records = front.app._leases._front, front.app._records
        assert await records.is_alive(name)
    assert not await records.is_alive(name), "it said goodbye"


async def test_who_hung_up_and_calls_again_at_once_is_heard(front: FrontEnd) -> None:
    await front.new_session()
    records = front.app._records
    await records.begin("default", "s", holder="left", lease_s=600)
    call = asyncio.create_task(front.turn("x", "s"))
    await asyncio.sleep(0.05)
    await records.release("default", "s", holder="left")
    assert (await call).finished.turn == 1


async def test_a_session_deleted_under_a_running_turn_ends_it() -> None:
    async with front_end(lease_s=0.3, redis_timeout_s=0.05) as front:
        await front.new_session()
        for worker in front.workers.values():
            worker.pause_s = 0.05
        turn = asyncio.create_task(front.turn("x", "s", max_new_tokens=10_000))
        await eventually(lambda: any(worker.generated for worker in front.workers.values()))
        await front.app._records.delete("default", "s")
        with pytest.raises(RpcError) as caught:
            await turn
        assert caught.value.code() == StatusCode.NOT_FOUND


async def test_a_fork_shares_the_past_and_not_the_future(front: FrontEnd) -> None:
    await front.new_session()
    first = await front.turn("one", "s")
    await front.turn("two", "s")
    fork = await front.sessions.ForkSession(pb.ForkSessionRequest(session_id="s", at_turn=1, new_session_id="f"))
    assert (fork.session_id, fork.parent_session_id, fork.parent_turn, fork.num_tokens) == ("f", "s", 1, 11)
    reply = await front.turn("other", "f")
    history = [*tokenize("one"), *first.token_ids]
    assert reply.token_ids == reply_to([*history, *tokenize("other")], 8)
    assert reply.finished.turn == 2
    assert reply.finished.receipt.device_tokens == 11
    assert (await front.session("s")).version == 2


async def test_a_fork_at_turn_zero_is_empty_and_one_without_a_turn_is_whole(front: FrontEnd) -> None:
    await front.new_session()
    await front.turn("one", "s")
    empty = await front.sessions.ForkSession(pb.ForkSessionRequest(session_id="s", at_turn=0))
    whole = await front.sessions.ForkSession(pb.ForkSessionRequest(session_id="s"))
    assert (empty.num_tokens, len(empty.turns)) == (0, 0)
    assert (whole.num_tokens, len(whole.turns)) == (11, 1)
    assert len({empty.session_id, whole.session_id, "s"}) == 3


async def test_residency_names_tier_and_worker(front: FrontEnd) -> None:
    await front.new_session()
    home = (await front.turn("one", "s")).finished.receipt.worker_id
    residency = (await front.session(with_residency=True)).residency
    assert [(at.tier, at.worker_id, at.tokens) for at in residency] == [(pb.TIER_DEVICE, home, 11)]
    calls = [call for worker in front.workers.values() for call in worker.calls if call.startswith("locate")]
    assert sorted(calls) == ["locate", "locate+redis"]


async def test_a_parked_session_leaves_every_worker_and_comes_back_from_redis(front: FrontEnd) -> None:
    await front.new_session()
    home = (await front.turn("one", "s")).finished.receipt.worker_id
    other = front.workers[other_than(front, home)]
    history = tuple((await front.session(with_token_ids=True)).token_ids)
    other.device.add(history)
    parked = await front.sessions.ParkSession(pb.ParkSessionRequest(session_id="s", drop_host=True))
    assert (parked.redis_tokens, parked.device_blocks_dropped, parked.bytes_stored) == (11, 2, 22)
    residency = (await front.session(with_residency=True)).residency
    assert [(at.tier, at.worker_id, at.tokens) for at in residency] == [(pb.TIER_REDIS, "", 11)]
    assert (await front.turn("two", "s")).finished.receipt.redis_tokens == 11


async def test_an_empty_session_is_parked_at_once(front: FrontEnd) -> None:
    await front.new_session()
    assert await front.sessions.ParkSession(pb.ParkSessionRequest(session_id="s")) == pb.ParkSessionResponse()


async def test_a_warmed_session_is_hot_where_its_next_turn_goes(front: FrontEnd) -> None:
    await front.new_session()
    await front.turn("one", "s")
    await front.sessions.ParkSession(pb.ParkSessionRequest(session_id="s"))
    await front.kill((await front.turn("two", "s")).finished.receipt.worker_id)
    warmed = await front.sessions.WarmSession(pb.WarmSessionRequest(session_id="s"))
    receipt = (await front.turn("three", "s")).finished.receipt
    assert warmed.restored_tokens == 22
    assert (receipt.worker_id, receipt.device_tokens) == (warmed.worker_id, 22)


async def test_deleting_empties_every_tier_and_counts(front: FrontEnd) -> None:
    await front.new_session()
    await front.turn("one", "s")
    history = tuple((await front.session(with_token_ids=True)).token_ids)
    front.workers["0"].redis.add(history)
    front.workers["1"].host.add(history)
    deleted = await front.sessions.DeleteSession(pb.DeleteSessionRequest(session_id="s"))
    assert (deleted.tokens, deleted.device_blocks, deleted.host_blocks, deleted.redis_blocks) == (11, 1, 1, 1)
    assert not any(worker.device or worker.host or worker.redis for worker in front.workers.values())
    with pytest.raises(RpcError) as caught:
        await front.session()
    assert caught.value.code() == StatusCode.NOT_FOUND


async def test_a_session_with_blocks_is_not_deleted_while_no_worker_can_drop_them(front: FrontEnd) -> None:
    await front.new_session()
    await front.turn("one", "s")
    for worker_id in front.workers:
        await front.kill(worker_id)
    await eventually(lambda: not front.app.directory.living())
    with pytest.raises(RpcError) as caught:
        await front.sessions.DeleteSession(pb.DeleteSessionRequest(session_id="s"))
    assert caught.value.code() == StatusCode.UNAVAILABLE
    assert (await front.session()).version == 1


async def test_pinning_keeps_the_blocks_for_ever(front: FrontEnd) -> None:
    await front.new_session(ttl_s=100)
    await front.turn("one", "s")
    pinned = await front.sessions.UpdateSession(pb.UpdateSessionRequest(session_id="s", pinned=True))
    loose = await front.sessions.UpdateSession(pb.UpdateSessionRequest(session_id="s", pinned=False, ttl_s=1_000_000))
    assert (pinned.pinned, pinned.ttl_s, loose.pinned, loose.ttl_s) == (True, 100, False, 1_000_000)
    assert [ttl for worker in front.workers.values() for ttl in worker.retained] == [0, 1_000_000]
    await front.turn("two", "s")
    assert sorted(request.block_ttl_s for worker in front.workers.values() for request in worker.generated) == [
        86_400,
        1_000_000,
    ]


async def test_sessions_are_listed_in_pages(front: FrontEnd) -> None:
    for number in range(5):
        await front.new_session(f"s{number}")
        await asyncio.sleep(0.002)
    page = await front.sessions.ListSessions(pb.ListSessionsRequest(page_size=3))
    rest = await front.sessions.ListSessions(pb.ListSessionsRequest(page_token=page.next_page_token))
    assert [session.session_id for session in page.sessions] == ["s4", "s3", "s2"]
    assert [session.session_id for session in rest.sessions] == ["s1", "s0"]
    assert rest.next_page_token == ""


async def test_cache_stats_sum_over_workers(front: FrontEnd) -> None:
    stats = await front.cache.GetCacheStats(pb.GetCacheStatsRequest())
    assert [worker.worker_id for worker in stats.workers] == ["0", "1"]
    assert stats.prompt_tokens == pb.TokensBySource(device=20, host=40, redis=60, computed=80)
    assert (stats.hit_rate, stats.device_hit_rate, stats.redis_hit_rate) == (0.6, 0.1, 0.3)
    assert stats.redis.available


async def test_without_redis_turns_go_on_and_sessions_are_unavailable(own_redis: RedisServer) -> None:
    async with front_end(redis_url=own_redis.url, redis_timeout_s=0.3) as front:
        await front.new_session()
        await front.turn("one", "s")
        own_redis.stop()
        assert (await front.turn("no session")).token_ids
        with pytest.raises(RpcError) as caught:
            await front.turn("two", "s")
        assert caught.value.code() == StatusCode.UNAVAILABLE
        assert not (await front.cache.GetCacheStats(pb.GetCacheStatsRequest())).redis.available
        own_redis.start()
        await front.new_session()
        assert (await front.turn("again", "s")).finished.turn == 1


async def test_a_turn_outlasts_a_short_absence_of_redis(own_redis: RedisServer) -> None:
    async with front_end(redis_url=own_redis.url, redis_timeout_s=0.3) as front:
        await front.new_session()
        for worker in front.workers.values():
            worker.pause_s = 0.05
        turn = asyncio.create_task(front.turn("x", "s"))
        await eventually(lambda: any(worker.generated for worker in front.workers.values()))
        own_redis.pause()
        await asyncio.sleep(0.5)  # the reply is complete, its commit stalls
        own_redis.resume()
        assert (await turn).finished.turn == 1
        session = await front.session()
        assert (session.version, session.num_tokens) == (1, 9)


async def test_a_turn_that_cannot_be_committed_is_not_finished(own_redis: RedisServer) -> None:
    async with front_end(redis_url=own_redis.url, redis_timeout_s=0.2) as front:
        await front.new_session()
        for worker in front.workers.values():
            worker.pause_s = 0.05
        turn = asyncio.create_task(front.turn("x", "s"))
        await eventually(lambda: any(worker.generated for worker in front.workers.values()))
        own_redis.stop()
        with pytest.raises(RpcError) as caught:
            await turn
        assert caught.value.code() == StatusCode.UNAVAILABLE


async def test_draining_lets_turns_end_and_takes_no_new_ones(front: FrontEnd) -> None:
    for worker in front.workers.values():
        worker.pause_s = 0.05
    turn = asyncio.create_task(front.turn())
    await eventually(lambda: any(worker.generated for worker in front.workers.values()))
    drain = asyncio.create_task(front.app.drain())
    await asyncio.sleep(0.05)
    with pytest.raises(RpcError) as caught:
        await front.turn()
    assert caught.value.code() == StatusCode.UNAVAILABLE
    assert (await turn).token_ids
    await drain


async def test_two_front_ends_share_sessions_through_redis(redis_url: str) -> None:
    async with front_end(redis_url=redis_url) as front:
        addresses = StaticAddresses({name: worker.address for name, worker in front.workers.items()})
        second = Application.build(front.app._config, addresses)
        await second.start()
        async with grpc.aio.insecure_channel(second.address) as channel:
            other = FrontEnd(second, front.workers, channel)
            await front.new_session()
            home = (await front.turn("one", "s")).finished.receipt.worker_id
            reply = await other.turn("two", "s")
            assert (reply.finished.turn, reply.finished.receipt.worker_id) == (2, home)
        await second.aclose()


async def test_reflection_lists_the_public_services_only(front: FrontEnd) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(front.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (response,) = [answer async for answer in stub.ServerReflectionInfo(iter([request]))]
    assert sorted(service.name for service in response.list_services_response.service) == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "rekindle.v1.Cache",
        "rekindle.v1.Inference",
        "rekindle.v1.Memory",
        "rekindle.v1.Sessions",
        "rekindle.v1.Tenants",
    ]


async def test_a_port_in_use_is_said_so(front: FrontEnd) -> None:
    port = int(front.app.address.rsplit(":", 1)[1])
    with pytest.raises(OSError, match=str(port)):
        async with front_end(num_workers=0, port=port):
            pass
