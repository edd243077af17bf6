"""A worker that goes away in mid-reply is not seen by the client: another one goes on from the last token."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc.aio import AioRpcError

from cache_store.embedded_redis import RedisServer
from protos import rekindle_pb2 as pb
from protos import rekindle_worker_pb2 as wpb
from server.errors import WorkerLost
from tests.fake_worker import FakeWorker, FrontEnd, Reply, field_of, front_end, reply_to, tokenize
from worker.errors import ContextTooLong, Draining, Overloaded


@pytest.fixture
async def front() -> AsyncIterator[FrontEnd]:
    async with front_end() as running:
        yield running


async def eventually(front: FrontEnd, *, calls: int = 1, deltas: int = 0) -> FakeWorker:
    """The worker that has had so many calls and sent so many deltas, as soon as one has."""
    async with asyncio.timeout(10):
        while True:
            for worker in front.workers.values():
                if len(worker.generated) >= calls and worker.deltas_sent >= deltas:
                    return worker
            await asyncio.sleep(0.005)


def another(front: FrontEnd, than: FakeWorker) -> FakeWorker:
    (other,) = (worker for worker in front.workers.values() if worker is not than)
    return other


async def hear(stream: Any, heard: list[pb.GenerateResponse]) -> None:
    """To its end. Raises AioRpcError."""
    while response := await stream.read():
        heard.append(response)


async def called(front: FrontEnd, name: str) -> FakeWorker:
    """The worker that has had such a call, as soon as one has."""
    async with asyncio.timeout(10):
        while True:
            for worker in front.workers.values():
                if name in worker.calls:
                    return worker
            await asyncio.sleep(0.005)


def forget(front: FrontEnd, worker: FakeWorker) -> None:
    """From now on nobody says where this worker is."""
    source: Any = front.app.directory._source
    del source._addresses[worker.worker_id]


async def as_soon_as_it_is_free(front: FrontEnd, request: pb.GenerateRequest) -> Reply:
    """Run a turn, again and again while the session is locked or can't be read."""
    async with asyncio.timeout(20):
        while True:
            try:
                return Reply([event async for event in front.inference.Generate(request)])
            except AioRpcError as error:
                if error.code() not in (grpc.StatusCode.ABORTED, grpc.StatusCode.UNAVAILABLE):
                    raise
                await asyncio.sleep(0.05)


def asking(text: str = "x", session_id: str = "", **fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(session_id=session_id, text=text, **fields)  # type: ignore[arg-type]


async def test_another_worker_goes_on_from_the_last_token(front: FrontEnd) -> None:
    await front.new_session()
    for worker in front.workers.values():
        worker.pause_s = 0.05
    turn = asyncio.create_task(front.turn("x", "s", max_new_tokens=12))
    lost = await eventually(front, deltas=3)
    await lost.kill()
    reply = await turn
    assert reply.token_ids == reply_to(tokenize("x"), 12)
    assert reply.text == "".join(f"<{token}>" for token in reply.token_ids)
    assert reply.finished.receipt.worker_id == another(front, lost).worker_id
    (request,) = another(front, lost).generated
    assert 3 <= len(request.begun.token_ids) < 12
    assert list(request.tokens.token_ids) == tokenize("x")
    assert request.sampling.seed == lost.generated[0].sampling.seed, "both draw the same"
    session = await front.session(with_token_ids=True)
    assert (session.version, list(session.token_ids)) == (1, [*tokenize("x"), *reply.token_ids])


async def test_a_worker_that_is_said_to_be_gone_loses_its_turns_to_another(front: FrontEnd) -> None:
    for worker in front.workers.values():
        worker.pause_s = 0.05
    await front.new_session()
    turn = asyncio.create_task(front.turn("x", "s", max_new_tokens=12))
    lost = await eventually(front, deltas=3)
    forget(front, lost)
    reply = await asyncio.wait_for(turn, 10)
    assert reply.token_ids == reply_to(tokenize("x"), 12)
    assert reply.finished.receipt.worker_id == another(front, lost).worker_id


async def test_and_so_do_its_other_calls(front: FrontEnd) -> None:
    for worker in front.workers.values():
        worker.may_warm.clear()
    await front.new_session()
    warming = asyncio.ensure_future(front.sessions.WarmSession(pb.WarmSessionRequest(session_id="s")))
    lost = await called(front, "warm")
    another(front, lost).may_warm.set()
    forget(front, lost)
    warmed = await asyncio.wait_for(warming, 10)
    assert warmed.worker_id == another(front, lost).worker_id


@pytest.mark.parametrize("way", ["ends", "fails", "drains"])
async def test_so_it_does_when_a_stream_ends_too_early_or_in_an_error(front: FrontEnd, way: str) -> None:
    for worker in front.workers.values():
        if way == "ends":
            worker.stop_after = 5
        else:
            worker.fail_after = 5
            worker.failure = Draining("leaving") if way == "drains" else RuntimeError("CUDA error")
    reply = await front.turn("x", max_new_tokens=9)
    assert reply.token_ids == reply_to(tokenize("x"), 9)
    assert [len(worker.generated) for worker in front.workers.values()] == [1, 1]


@pytest.mark.parametrize("way", ["fail_after", "stop_after"])
async def test_what_kills_every_worker_is_not_given_to_all_of_them(way: str) -> None:
    async with front_end(5) as front:
        for worker in front.workers.values():
            setattr(worker, way, 1)
        with pytest.raises(AioRpcError) as caught:
            await front.turn("x", max_new_tokens=9)
        assert caught.value.code() == grpc.StatusCode.INTERNAL, "a client tries again what is UNAVAILABLE"
        assert sum(len(worker.generated) for worker in front.workers.values()) == 3


async def test_only_a_worker_with_the_same_model_goes_on(front: FrontEnd) -> None:
    for worker in front.workers.values():
        worker.pause_s = 0.05
    turn = asyncio.create_task(front.turn("x", max_new_tokens=12))
    lost = await eventually(front, deltas=2)
    another(front, lost).fingerprint = "beef"
    await asyncio.sleep(0.3)  # it is asked what it is again and again
    await lost.kill()
    await asyncio.sleep(0.3)
    assert not another(front, lost).generated
    await lost.start()
    assert (await turn).token_ids == reply_to(tokenize("x"), 12)
    assert len(lost.generated) == 2


@pytest.mark.parametrize("begun", [True, False], ids=["in mid-reply", "before the first token"])
async def test_with_nobody_left_a_turn_waits_for_a_worker_to_come_up(begun: bool) -> None:
    async with front_end(1) as front:
        worker = front.workers["0"]
        worker.pause_s = 0.05 if begun else 30.0
        turn = asyncio.create_task(front.turn("x", max_new_tokens=12))
        await eventually(front, deltas=2 if begun else 0)
        await worker.kill()
        await asyncio.sleep(0.5)
        assert not turn.done()
        worker.pause_s = 0.0
        await worker.start()
        assert (await turn).token_ids == reply_to(tokenize("x"), 12)


async def test_a_worker_that_is_full_is_asked_again_for_a_reply_that_was_begun(front: FrontEnd) -> None:
    for worker in front.workers.values():
        worker.pause_s = 0.05
    turn = asyncio.create_task(front.turn("x", max_new_tokens=12))
    lost = await eventually(front, deltas=2)
    another(front, lost).refuse_with = Overloaded("256 wait", 2.5)
    await lost.kill()
    await asyncio.sleep(0.5)
    another(front, lost).refuse_with = None
    assert (await turn).token_ids == reply_to(tokenize("x"), 12)


async def test_a_refusal_that_every_worker_would_give_ends_the_turn(front: FrontEnd) -> None:
    for worker in front.workers.values():
        worker.pause_s = 0.05
    turn = asyncio.create_task(front.turn("x", max_new_tokens=12))
    lost = await eventually(front, deltas=2)
    another(front, lost).refuse_with = ContextTooLong("no room")
    await lost.kill()
    with pytest.raises(AioRpcError) as caught:
        await turn
    assert caught.value.code() == grpc.StatusCode.OUT_OF_RANGE


@pytest.mark.parametrize("on_failure", [pb.ON_FAILURE_DISCARD, pb.ON_FAILURE_COMMIT])
@pytest.mark.parametrize("with_deadline", [True, False])
async def test_when_no_worker_comes_the_turn_ends_as_it_asked_to(on_failure: int, with_deadline: bool) -> None:
    async with front_end(1, failover_wait_s=1.0) as front:
        await front.new_session()
        worker = front.workers["0"]
        worker.pause_s = 0.05
        request = asking("x", "s", sampling=pb.Sampling(max_new_tokens=40), on_failure=on_failure)
        stream = front.inference.Generate(request, timeout=2.5 if with_deadline else None)
        heard = [await stream.read() for _ in range(3)]
        await worker.kill()
        began = time.monotonic()
        with pytest.raises(AioRpcError) as caught:
            await hear(stream, heard)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert 0.5 < time.monotonic() - began < 2.4
        session = await front.session(with_token_ids=True)
        if on_failure == pb.ON_FAILURE_DISCARD:
            assert (session.version, session.num_tokens) == (0, 0)
            return
        said = [token for response in heard for token in response.delta.token_ids]
        assert list(session.token_ids) == [*tokenize("x"), *said]
        assert session.turns[0].reason == pb.FINISH_REASON_INTERRUPTED
        await worker.start()
        await front.app.directory.wait_for_workers(1, timeout_s=5)
        worker.pause_s = 0.0
        assert (await front.turn("y", "s")).finished.turn == 2


async def test_a_client_that_hangs_up_while_its_turn_waits_frees_the_session() -> None:
    async with front_end(1) as front:
        await front.new_session()
        front.workers["0"].pause_s = 0.05
        stream = front.inference.Generate(asking("x", "s", on_failure=pb.ON_FAILURE_COMMIT))
        await stream.read()
        await front.kill("0")
        await asyncio.sleep(0.2)
        stream.cancel()
        await front.workers["0"].start()
        await front.app.directory.wait_for_workers(1, timeout_s=5)
        reply = await as_soon_as_it_is_free(front, asking("y", "s"))
        assert reply.finished.turn == 1, "what was cancelled is not committed"


@pytest.mark.parametrize("is_cancelled", [True, False])
async def test_a_stream_that_is_let_go_is_a_lost_worker_unless_its_caller_has_gone_too(is_cancelled: bool) -> None:
    async with front_end(1) as front:
        front.workers["0"].pause_s = 30.0
        (worker,) = front.app.directory.living()

        async def listen() -> None:
            request = wpb.WorkerGenerateRequest(text="x")
            async for _ in worker.client.generate(request, timeout_s=None):
                pass

        call = asyncio.create_task(listen())
        await eventually(front)
        worker.client.abandon()
        if is_cancelled:
            call.cancel()
        with pytest.raises(asyncio.CancelledError if is_cancelled else WorkerLost):
            await call


# Turns that are sent again


async def test_a_turn_is_sent_again_by_its_key_and_not_generated_twice(front: FrontEnd) -> None:
    await front.new_session()
    await front.turn("one", "s")
    asked = asking("two", "s", idempotency_key="k", sampling=pb.Sampling(max_new_tokens=5))
    first, second = [Reply([event async for event in front.inference.Generate(asked)]) for _ in range(2)]
    assert (second.text, second.token_ids) == (first.text, first.token_ids)
    assert (first.finished.turn, first.finished.repeated) == (2, False)
    assert (second.finished.turn, second.finished.repeated) == (2, True)
    assert (second.finished.reason, second.finished.usage) == (first.finished.reason, first.finished.usage)
    session = await front.session()
    assert (session.version, session.turns[1].idempotency_key) == (2, "k")
    third = await front.turn("three", "s")
    assert third.finished.turn == 3
    again = Reply([event async for event in front.inference.Generate(asked)])
    assert (again.text, again.finished.turn) == (first.text, 2), "also when the session has gone on"


async def test_a_fork_has_none_of_its_parents_keys(front: FrontEnd) -> None:
    await front.new_session()
    asked = asking("one", "s", idempotency_key="k")
    Reply([event async for event in front.inference.Generate(asked)])
    await front.sessions.ForkSession(pb.ForkSessionRequest(session_id="s", new_session_id="f"))
    asked.session_id = "f"
    assert not Reply([event async for event in front.inference.Generate(asked)]).finished.repeated


@pytest.mark.parametrize(("key", "session_id"), [("no spaces", "s"), ("k" * 129, "s"), ("k", "")])
async def test_a_key_that_can_be_none_is_refused(front: FrontEnd, key: str, session_id: str) -> None:
    with pytest.raises(AioRpcError) as caught:
        await front.inference.Generate(asking("x", session_id, idempotency_key=key)).read()
    assert (caught.value.code(), field_of(caught.value)) == (grpc.StatusCode.INVALID_ARGUMENT, "idempotency_key")


async def test_a_commit_whose_answer_was_lost_is_found_by_its_key(own_redis: RedisServer) -> None:
    async with front_end(redis_url=own_redis.url, redis_timeout_s=0.2, lease_s=2.0) as front:
        await front.new_session()
        for worker in front.workers.values():
            worker.pause_s = 0.05
        asked = asking("one", "s", idempotency_key="k", sampling=pb.Sampling(max_new_tokens=4))
        stream = front.inference.Generate(asked)
        await stream.read()
        own_redis.pause()  # what it is sent now it does when it wakes, though nobody hears of it
        with pytest.raises(AioRpcError) as caught:
            await hear(stream, [])
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        own_redis.resume()
        reply = await as_soon_as_it_is_free(front, asked)
        assert reply.token_ids == reply_to(tokenize("one"), 4)
        session = await front.session(with_token_ids=True)
        assert list(session.token_ids) == [*tokenize("one"), *reply.token_ids], "once"
