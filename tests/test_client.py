"""The client against a front end that answers by script, over real gRPC."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2  # type: ignore[import-untyped]

from protos import rekindle_pb2 as pb
from rekindle import errors
from rekindle.client import Client, Generation
from rekindle.sync_client import Client as PlainClient
from tests.scripted_front_end import Script, ScriptedFrontEnd, delta, finished, refuse, serving


@pytest.fixture
async def front_end() -> AsyncIterator[ScriptedFrontEnd]:
    async with serving(ScriptedFrontEnd()) as front_end:
        yield front_end


@pytest.fixture
async def client(front_end: ScriptedFrontEnd) -> AsyncIterator[Client]:
    async with Client(front_end.target, timeout_s=10.0) as client:
        yield client


async def reply(request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:
    yield delta("good ", 7)
    yield delta("day", 8, 9)
    yield finished(receipt=pb.Receipt(redis_tokens=3), turn=2)


def refusing(code: grpc.StatusCode, *details: Any, after: tuple[pb.GenerateResponse, ...] = ()) -> Script:
    async def script(request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        for response in after:
            yield response
        await refuse(context, code, "by script", details)

    return script


def retry_in(seconds: float) -> error_details_pb2.RetryInfo:
    return error_details_pb2.RetryInfo(retry_delay=Duration(nanos=int(seconds * 1e9)))


WHY = error_details_pb2.ErrorInfo(reason="NO_WORKER", domain="rekindle")


async def test_a_generation_streams_deltas_and_ends_with_what_the_turn_cost(
    front_end: ScriptedFrontEnd, client: Client
) -> None:
    front_end.turns = [reply]
    generation = client.generate("hello", session_id="s", max_new_tokens=5, stop=["x"])
    assert [piece.text async for piece in generation] == ["good ", "day"]
    assert (generation.text, generation.token_ids) == ("good day", [7, 8, 9])
    assert generation.receipt is not None
    assert generation.receipt.redis_tokens == 3
    assert generation.finished is not None
    assert generation.finished.turn == 2
    sampling = pb.Sampling(max_new_tokens=5, stop=["x"])
    (request,) = front_end.requests
    key = request.idempotency_key
    assert key
    assert request == pb.GenerateRequest(session_id="s", text="hello", sampling=sampling, idempotency_key=key)


async def test_chat_messages_and_token_ids_travel_in_their_own_fields(
    front_end: ScriptedFrontEnd, client: Client
) -> None:
    front_end.turns = [reply, reply]
    await client.generate([{"role": "user", "content": "hi"}]).read()
    await client.generate([1, 2]).read()
    assert front_end.requests[0].chat.messages == [pb.ChatMessage(role="user", content="hi")]
    assert front_end.requests[1].tokens.token_ids == [1, 2]


async def test_an_unknown_sampling_field_is_refused_before_anything_is_sent(client: Client) -> None:
    with pytest.raises(ValueError, match="temprature"):
        client.generate("hello", temprature=1.0)


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
async def test_a_turn_refused_before_its_first_token_is_sent_again_when_the_server_says(
    front_end: ScriptedFrontEnd, client: Client, code: grpc.StatusCode
) -> None:
    front_end.turns = [refusing(code, retry_in(0.3)), reply]
    start = time.monotonic()
    assert await client.generate("hello", session_id="s").read() == "good day"
    assert time.monotonic() - start >= 0.3
    assert len(front_end.requests) == 2


async def test_a_turn_that_has_begun_is_never_sent_again(front_end: ScriptedFrontEnd, client: Client) -> None:
    front_end.turns = [refusing(grpc.StatusCode.UNAVAILABLE, retry_in(0.01), after=(delta("a", 1),)), reply]
    generation = client.generate("hello")
    with pytest.raises(errors.Unavailable):
        await generation.read()
    assert (generation.text, generation.finished, len(front_end.requests)) == ("a", None, 1)


async def test_a_session_turn_that_may_have_been_run_is_sent_again_under_its_key(
    front_end: ScriptedFrontEnd, client: Client
) -> None:
    broken = refusing(grpc.StatusCode.UNAVAILABLE)
    front_end.turns = [broken, refusing(grpc.StatusCode.UNAVAILABLE, WHY), reply, reply, reply]
    assert await client.generate("hello", session_id="s").read() == "good day"
    assert len(front_end.requests) == 3
    assert len({request.idempotency_key for request in front_end.requests}) == 1
    await client.generate("hello", session_id="s").read()
    assert front_end.requests[-1].idempotency_key != front_end.requests[0].idempotency_key
    await client.generate("hello", session_id="s", idempotency_key="mine", keep_begun=True).read()
    assert front_end.requests[-1].idempotency_key == "mine"
    assert front_end.requests[-1].on_failure == pb.ON_FAILURE_COMMIT


async def test_retries_are_bounded(front_end: ScriptedFrontEnd, client: Client) -> None:
    front_end.turns = [refusing(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_in(0.01))] * 10
    with pytest.raises(errors.Overloaded) as caught:
        await client.generate("hello").read()
    assert caught.value.retry_after_s == pytest.approx(0.01)
    assert len(front_end.requests) == 4


async def test_a_retry_that_would_outlast_the_deadline_is_not_waited_for(
    front_end: ScriptedFrontEnd, client: Client
) -> None:
    front_end.turns = [refusing(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_in(0.9))]
    start = time.monotonic()
    with pytest.raises(errors.Overloaded):
        await client.generate("hello", timeout_s=0.5).read()
    assert time.monotonic() - start < 0.5


async def test_overload_without_a_delay_is_the_callers_to_decide(front_end: ScriptedFrontEnd, client: Client) -> None:
    front_end.turns = [refusing(grpc.StatusCode.RESOURCE_EXHAUSTED)]
    with pytest.raises(errors.Overloaded):
        await client.generate("hello").read()


async def stall(request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:
    yield delta("a", 1)
    await asyncio.sleep(60)


async def test_cancel_ends_the_iteration_and_reaches_the_server(front_end: ScriptedFrontEnd, client: Client) -> None:
    gone = asyncio.Event()

    async def watch(request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        try:
            async for response in stall(request, context):
                yield response
        finally:
            gone.set()

    front_end.turns = [watch]
    generation = client.generate("hello")
    async for _ in generation:
        generation.cancel()
    assert (generation.text, generation.finished) == ("a", None)
    async with asyncio.timeout(5):
        await gone.wait()


async def test_leaving_the_block_early_cancels_the_turn(front_end: ScriptedFrontEnd, client: Client) -> None:
    gone = asyncio.Event()

    async def watch(request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        context.add_done_callback(lambda _: gone.set())
        async for response in stall(request, context):
            yield response

    front_end.turns = [watch]
    async with client.generate("hello") as generation:
        async for _ in generation:
            break
    async with asyncio.timeout(5):
        await gone.wait()


async def test_a_turn_cancelled_before_it_started_sends_nothing(front_end: ScriptedFrontEnd, client: Client) -> None:
    generation = client.generate("hello")
    generation.cancel()
    assert await generation.read() == ""
    assert front_end.requests == []


async def test_a_turn_cancelled_while_it_waits_for_a_connection_is_not_run(
    front_end: ScriptedFrontEnd, client: Client
) -> None:
    front_end.turns = [reply]
    connected = asyncio.Event()

    async def start(request: pb.GenerateRequest, timeout_s: float) -> Any:
        await connected.wait()
        return await client._start_turn(request, timeout_s)

    generation = Generation(start, pb.GenerateRequest(text="hello"), 10.0)
    reading = asyncio.create_task(generation.read())
    await asyncio.sleep(0)
    generation.cancel()
    connected.set()
    assert await reading == ""
    assert generation.finished is None


async def test_a_deadline_ends_a_turn(front_end: ScriptedFrontEnd, client: Client) -> None:
    front_end.turns = [stall]
    with pytest.raises(errors.TimedOut):
        await client.generate("hello", timeout_s=0.3).read()


async def test_a_server_that_is_not_there_is_waited_for_within_bounds() -> None:
    async with Client("127.0.0.1:1", connect_timeout_s=0.3) as client:
        start = time.monotonic()
        with pytest.raises(errors.Unavailable, match=r"127\.0\.0\.1:1"):
            await client.generate("hello", session_id="s").read()
        assert time.monotonic() - start < 2


async def test_listing_fetches_all_pages(front_end: ScriptedFrontEnd, client: Client) -> None:
    front_end.sessions = [pb.Session(session_id=f"s{number}") for number in range(7)]
    assert [session.session_id async for session in client.list_sessions(page_size=3)] == [f"s{n}" for n in range(7)]
    assert len(front_end.requests) == 3


async def test_reads_are_retried_and_creation_is_not(front_end: ScriptedFrontEnd, client: Client) -> None:
    front_end.errors = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE]
    assert (await client.get_session("s")).session_id == "s"
    assert len(front_end.requests) == 3
    front_end.errors = [grpc.StatusCode.UNAVAILABLE]
    with pytest.raises(errors.Unavailable):
        await client.create_session("s")
    assert len(front_end.requests) == 4


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, errors.BadInput),
        (grpc.StatusCode.OUT_OF_RANGE, errors.TooLong),
        (grpc.StatusCode.NOT_FOUND, errors.NotFound),
        (grpc.StatusCode.ALREADY_EXISTS, errors.AlreadyExists),
        (grpc.StatusCode.ABORTED, errors.Busy),
        (grpc.StatusCode.UNAUTHENTICATED, errors.Denied),
        (grpc.StatusCode.INTERNAL, errors.RekindleError),
    ],
)
async def test_every_code_has_its_error(
    front_end: ScriptedFrontEnd, client: Client, code: grpc.StatusCode, kind: type[errors.RekindleError]
) -> None:
    front_end.errors = [code]
    with pytest.raises(errors.RekindleError) as caught:
        await client.get_session("s")
    assert type(caught.value) is kind
    assert (caught.value.code, caught.value.message, caught.value.field) == (code, "by script", "")


async def test_an_error_names_the_field_and_keeps_the_details(front_end: ScriptedFrontEnd, client: Client) -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="sampling.top_p", description="must be above 0")
    bad = error_details_pb2.BadRequest(field_violations=[violation])
    front_end.turns = [refusing(grpc.StatusCode.INVALID_ARGUMENT, bad)]
    with pytest.raises(errors.BadInput) as caught:
        await client.generate("hello").read()
    assert (caught.value.field, caught.value.details) == ("sampling.top_p", (bad,))
    assert str(caught.value) == "INVALID_ARGUMENT: by script"


async def test_the_plain_client_does_the_same_from_a_thread(front_end: ScriptedFrontEnd) -> None:
    front_end.turns = [reply, stall]
    front_end.sessions = [pb.Session(session_id=f"s{number}") for number in range(3)]
    front_end.errors = [grpc.StatusCode.NOT_FOUND]

    def use() -> None:
        with PlainClient(front_end.target, timeout_s=10.0) as client:
            with pytest.raises(errors.NotFound):
                client.get_session("s")
            assert client.create_session("mine", ttl_s=5, codec="int4").session_id == "mine"
            assert front_end.requests[-1].codec == "int4"
            assert [session.session_id for session in client.list_sessions(page_size=2)] == ["s0", "s1", "s2"]
            generation = client.generate("hello")
            assert [piece.text for piece in generation] == ["good ", "day"]
            assert generation.receipt is not None
            assert generation.receipt.redis_tokens == 3
            with client.generate("hello") as stalled:
                for _ in stalled:
                    stalled.cancel()
            assert (stalled.text, stalled.finished) == ("a", None)

    await asyncio.to_thread(use)
