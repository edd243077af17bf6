"""The worker's gRPC service over real gRPC, around a scripted engine; then a whole worker process."""

import asyncio
import re
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from cache_store.errors import StoreUnavailable
from protos import rekindle_pb2 as pb
from protos import rekindle_worker_pb2 as wpb
from protos.rekindle_worker_pb2_grpc import WorkerStub
from protos.status import DETAILS_KEY
from rekindle.display import receipt_line, to_dict
from tests.fake_engine import FakeEngine
from worker.calls import (
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerateCall,
    MissReason,
    PlanKind,
    Receipt,
    RestorePlan,
    Sampling,
    Token,
    TokenLogprobs,
)
from worker.errors import ContextTooLong, DeadlinePassed, Draining, Overloaded
from worker.metrics import WorkerMetrics
from worker.model.presets_tokenizer import byte_tokenizer
from worker.service import WorkerService, start_server
from worker.text import TextCodec
from worker.translate import finished_event

CODEC = TextCodec(byte_tokenizer(1000))


def tokens_of(text: str) -> list[Event]:
    return [Token(token_id) for token_id in CODEC.encode(text, is_first=False)]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def stub(engine: FakeEngine) -> AsyncIterator[Any]:
    service = WorkerService(engine, CODEC, worker_id="w-1", model="preset:tiny", metrics_address="127.0.0.1:1")
    server, address = await start_server(service, "127.0.0.1")
    async with grpc.aio.insecure_channel(address) as channel:
        yield WorkerStub(channel)  # type: ignore[no-untyped-call]
    engine.close()
    await server.stop(grace=1.0)
    service.close()


def asking(text: str = "hi", *, history: Sequence[int] = (), **sampling: Any) -> wpb.WorkerGenerateRequest:
    return wpb.WorkerGenerateRequest(
        request_id="r",
        history=wpb.History(tenant="t", token_ids=history),
        text=text,
        sampling=pb.Sampling(**sampling),
        block_ttl_s=60,
    )


class Heard:
    """All that a client was told."""

    def __init__(self, events: Sequence[wpb.WorkerEvent]) -> None:
        kinds = [event.WhichOneof("event") for event in events]
        assert kinds == ["started"] + ["delta"] * (len(kinds) - 2) + ["finished"]
        self.input_ids = list(events[0].started.input_token_ids)
        self.deltas = [event.delta for event in events[1:-1]]
        self.finished = events[-1].finished

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def token_ids(self) -> list[int]:
        return [token_id for delta in self.deltas for token_id in delta.token_ids]


async def hear(stub: Any, request: wpb.WorkerGenerateRequest, **options: Any) -> Heard:
    return Heard([event async for event in stub.Generate(request, **options)])


async def failure(call: Any) -> tuple[grpc.StatusCode, str, dict[str, Any]]:
    """Code, message and google.rpc details of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await to_its_end(call)
    error = caught.value
    trailing: Any = error.trailing_metadata()
    status = status_pb2.Status.FromString(dict(trailing).get(DETAILS_KEY, b""))
    found = {}
    for packed in status.details:
        kind = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])()
        packed.Unpack(kind)
        found[type(kind).__name__] = kind
    return error.code(), error.details() or "", found


async def to_its_end(call: Any) -> None:
    if hasattr(call, "__aiter__"):
        async for _ in call:
            pass
    else:
        await call


async def test_a_turn_is_started_then_deltas_then_finished_with_its_accounts(stub: Any, engine: FakeEngine) -> None:
    engine.script = tokens_of("good day")
    heard = await hear(stub, asking("hi", history=[9, 10], seed=5, max_new_tokens=8))
    assert heard.input_ids == list(CODEC.encode("hi", is_first=False))
    assert heard.text == "good day"
    assert heard.token_ids == [event.token_id for event in engine.script if isinstance(event, Token)]
    assert heard.finished.reason == pb.FINISH_REASON_LENGTH
    assert heard.finished.usage == pb.Usage(prompt_tokens=4, completion_tokens=8, input_tokens=2)
    assert heard.finished.seed == 5
    assert heard.finished.receipt == pb.Receipt(
        host_tokens=1,
        computed_tokens=3,
        misses=[pb.Miss(reason="MISS_REASON_NEW", tokens=3)],
        restored_bytes=64,
        decode_ms=10.0,
        ttft_ms=20.0,
        worker_id="w-1",
    )
    (call,) = engine.calls
    assert (call.tenant, call.history, call.input) == ("t", (9, 10), tuple(heard.input_ids))
    assert (call.max_new_tokens, call.block_ttl_s, call.deadline_s) == (8, 60, None)
    assert call.eos_token_ids == {1}


async def test_unset_sampling_takes_the_documented_defaults_and_set_fields_arrive(
    stub: Any, engine: FakeEngine
) -> None:
    seeds = {(await hear(stub, asking())).finished.seed for _ in range(3)}
    assert len(seeds) == 3
    plain = engine.calls[0]
    assert (plain.sampling.temperature, plain.sampling.top_p, plain.sampling.top_k) == (0.0, 1.0, 0)
    assert (plain.max_new_tokens, plain.sampling.logprobs) == (None, None)
    await hear(stub, asking(temperature=0.5, top_k=7, ignore_eos=True, stop_token_ids=[3], logprobs=0, seed=0))
    full = engine.calls[-1]
    assert (full.sampling.temperature, full.sampling.top_k, full.sampling.logprobs) == (0.5, 7, 0)
    assert (full.sampling.seed, full.eos_token_ids, full.stop_token_ids) == (0, frozenset(), frozenset({3}))


async def test_tokens_that_pile_up_leave_as_one_delta(stub: Any, engine: FakeEngine) -> None:
    engine.script = tokens_of("x" * 2000)
    heard = await hear(stub, asking())
    assert heard.text == "x" * 2000
    assert len(heard.deltas) < 1000


async def test_token_ids_leave_at_once_and_their_text_when_the_character_is_whole(
    stub: Any, engine: FakeEngine
) -> None:
    emoji = tokens_of("👩")
    engine.script, engine.reason = emoji[:3], None
    stream = stub.Generate(asking())
    await stream.read()
    seen: list[int] = []
    while len(seen) < 3:
        delta = (await stream.read()).delta
        assert delta.text == ""
        seen += delta.token_ids
    engine.finish(engine.calls[0].request_id, 3)
    assert (await stream.read()).delta.text == "\ufffd"  # the reply ended in mid-character
    assert (await stream.read()).finished.usage.completion_tokens == 3


async def test_a_stop_string_ends_the_reply_before_it_and_reports_no_token_after_it(
    stub: Any, engine: FakeEngine
) -> None:
    engine.script, engine.reason = tokens_of("one END two"), None
    heard = await hear(stub, asking(stop=["END", "never"]))
    assert heard.text == "one "
    assert heard.token_ids == list(CODEC.encode("one END", is_first=False))
    assert heard.finished.reason == pb.FINISH_REASON_STOP
    assert heard.finished.stop_string == "END"
    assert not heard.finished.HasField("stop_token_id")
    assert heard.finished.usage.completion_tokens == 7
    assert engine.kept == {engine.calls[0].request_id: 7}


async def test_a_stop_string_wins_even_if_the_engine_ended_before_it_could_be_told(
    stub: Any, engine: FakeEngine
) -> None:
    engine.script, engine.reason = tokens_of("aXb"), FinishReason.LENGTH
    heard = await hear(stub, asking(stop=["X"]))
    assert (heard.text, heard.finished.reason, heard.finished.usage.completion_tokens) == (
        "a",
        pb.FINISH_REASON_STOP,
        2,
    )


async def test_text_held_for_a_stop_string_that_never_came_is_shown_at_the_end(stub: Any, engine: FakeEngine) -> None:
    engine.script = tokens_of("the EN")
    heard = await hear(stub, asking(stop=["END"]))
    assert heard.text == "the EN"
    assert heard.finished.reason == pb.FINISH_REASON_LENGTH


async def test_a_stop_token_is_named(stub: Any, engine: FakeEngine) -> None:
    engine.script, engine.reason = [*tokens_of("a"), Token(300)], FinishReason.STOP
    heard = await hear(stub, asking(stop_token_ids=[300]))
    assert heard.finished.stop_token_id == 300
    assert heard.finished.stop_string == ""


# Replies that another worker has begun


def going_on(text: str, num_sent: int, **sampling: Any) -> wpb.WorkerGenerateRequest:
    """A request that goes on after `text`, of which its client has `num_sent` characters."""
    request = asking("hi", **sampling)
    request.begun.token_ids.extend(CODEC.encode(text, is_first=False))
    request.begun.text_characters = num_sent
    return request


async def test_a_reply_that_was_begun_goes_on_behind_what_its_client_has(stub: Any, engine: FakeEngine) -> None:
    engine.script = tokens_of(" day")
    heard = await hear(stub, going_on("good", 4))
    assert heard.text == " day"
    assert heard.token_ids == [event.token_id for event in engine.script if isinstance(event, Token)]
    assert engine.calls[0].begun == CODEC.encode("good", is_first=False)
    assert heard.finished.usage.completion_tokens == 8


async def test_text_that_its_client_has_not_is_sent_with_what_follows(stub: Any, engine: FakeEngine) -> None:
    engine.script = tokens_of("D")
    assert (await hear(stub, going_on("the EN", 4, stop=["END"]))).text == ""
    engine.script = tokens_of("X")
    assert (await hear(stub, going_on("the EN", 4, stop=["END"]))).text == "ENX"
    engine.script = tokens_of("y")
    assert (await hear(stub, going_on("all", 0))).text == "ally"


async def test_text_that_ended_the_reply_is_not_sent_twice(stub: Any, engine: FakeEngine) -> None:
    engine.script = ()
    heard = await hear(stub, going_on("the EN", 6, stop=["END"]))  # its Finished alone was lost
    assert (heard.text, heard.token_ids) == ("", [])
    assert heard.finished.usage.completion_tokens == 6


async def test_a_stop_string_that_was_complete_ends_the_reply_at_once(stub: Any, engine: FakeEngine) -> None:
    engine.script, engine.reason = tokens_of("more"), None
    heard = await hear(stub, going_on("one END", 4, stop=["END"]))
    assert (heard.text, heard.token_ids) == ("", [])
    assert (heard.finished.reason, heard.finished.stop_string) == (pb.FINISH_REASON_STOP, "END")
    assert engine.kept == {engine.calls[0].request_id: 7}
    assert heard.finished.usage.completion_tokens == 7


async def test_a_stop_token_that_was_sent_is_named_all_the_same(stub: Any, engine: FakeEngine) -> None:
    engine.script, engine.reason = (), FinishReason.STOP
    request = going_on("a", 1, stop_token_ids=[300])
    request.begun.token_ids.append(300)
    assert (await hear(stub, request)).finished.stop_token_id == 300


async def test_logprobs_come_with_their_tokens(stub: Any, engine: FakeEngine) -> None:
    engine.script = [Token(300, TokenLogprobs(-0.5, ((300, -0.5), (7, -1.5))))]
    heard = await hear(stub, asking(logprobs=2))
    (logprobs,) = heard.deltas[0].logprobs
    assert logprobs.logprob == -0.5
    assert [(top.token_id, top.logprob) for top in logprobs.top] == [(300, -0.5), (7, -1.5)]


async def test_chat_is_rendered_whole_at_first_and_as_a_continuation_later(stub: Any) -> None:
    chat = pb.ChatInput(messages=[pb.ChatMessage(role="user", content="hi")])
    first = await hear(stub, wpb.WorkerGenerateRequest(request_id="r", chat=chat))
    assert first.input_ids == list(CODEC.encode_chat([{"role": "user", "content": "hi"}], ()).token_ids)
    history = wpb.History(tenant="t", token_ids=[*first.input_ids, 300, 1])
    later = await hear(stub, wpb.WorkerGenerateRequest(request_id="r", history=history, chat=chat))
    assert later.input_ids == first.input_ids[1:]  # without the first token of all


async def test_a_client_that_goes_away_cancels_its_request(stub: Any, engine: FakeEngine) -> None:
    engine.script, engine.reason = tokens_of("a"), None
    stream = stub.Generate(asking())
    await stream.read()
    stream.cancel()
    assert await asyncio.to_thread(engine.ended[engine.calls[0].request_id].wait, 10)
    assert engine.kept == {}


async def test_the_clients_deadline_reaches_the_engine(stub: Any, engine: FakeEngine) -> None:
    before_s = time.monotonic()
    await hear(stub, asking(), timeout=50.0)
    (call,) = engine.calls
    assert call.deadline_s is not None
    assert before_s + 40 < call.deadline_s < time.monotonic() + 52  # gRPC rounds it up


async def test_equal_request_ids_do_not_meet_in_the_engine(stub: Any, engine: FakeEngine) -> None:
    await asyncio.gather(*(hear(stub, asking()) for _ in range(5)))
    assert len({call.request_id for call in engine.calls}) == 5


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (wpb.WorkerGenerateRequest(tokens=pb.TokenInput()), "input"),
        (wpb.WorkerGenerateRequest(request_id="r"), "input"),
        (asking(max_new_tokens=0), "sampling.max_new_tokens"),
        (asking(temperature=-1.0), "sampling.temperature"),
        (asking(temperature=float("nan")), "sampling.temperature"),
        (asking(top_p=0.0), "sampling.top_p"),
        (asking(min_p=2.0), "sampling.min_p"),
        (asking(repetition_penalty=0.0), "sampling.repetition_penalty"),
        (asking(presence_penalty=3.0), "sampling.presence_penalty"),
        (asking(frequency_penalty=-3.0), "sampling.frequency_penalty"),
        (asking(logprobs=21), "sampling.logprobs"),
        (asking(stop=["x"] * 17), "sampling.stop"),
        (asking(stop=[""]), "sampling.stop"),
        (asking(stop=["x" * 257]), "sampling.stop"),
        (asking(stop_token_ids=[1000]), "sampling.stop_token_ids"),
        (asking(history=[1000]), "history.token_ids"),
        (wpb.WorkerGenerateRequest(tokens=pb.TokenInput(token_ids=[1000])), "tokens.token_ids"),
        (wpb.WorkerGenerateRequest(chat=pb.ChatInput()), "chat"),
        (wpb.WorkerGenerateRequest(chat=pb.ChatInput(messages=[pb.ChatMessage(role="wizard")])), "chat"),
    ],
)
async def test_bad_input_is_refused_by_the_name_of_its_field(
    stub: Any, engine: FakeEngine, request_: wpb.WorkerGenerateRequest, field: str
) -> None:
    code, message, details = await failure(stub.Generate(request_))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert message.startswith(f"{field}: ")
    assert details["BadRequest"].field_violations[0].field == field
    assert engine.calls == []


@pytest.mark.parametrize(
    ("refusal", "code", "reason"),
    [
        (ContextTooLong("9 > 8"), grpc.StatusCode.OUT_OF_RANGE, "CONTEXT_TOO_LONG"),
        (Overloaded("full", 2.5), grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
        (Draining("leaving"), grpc.StatusCode.UNAVAILABLE, "DRAINING"),
        (DeadlinePassed("late"), grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_PASSED"),
        (StoreUnavailable("no Redis"), grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE"),
    ],
)
async def test_refusals_and_failures_have_their_codes(
    stub: Any, engine: FakeEngine, refusal: Exception, code: grpc.StatusCode, reason: str
) -> None:
    engine.script = [*tokens_of("a"), Failed(refusal)]
    in_stream = await failure(stub.Generate(asking()))
    engine.refusal = refusal
    for found, message, details in (
        in_stream,
        await failure(stub.Generate(asking())),
        await failure(stub.Park(wpb.ParkRequest())),
    ):
        assert (found, message, details["ErrorInfo"].reason) == (code, str(refusal), reason)
    if isinstance(refusal, Overloaded):
        assert in_stream[2]["RetryInfo"].retry_delay.ToMilliseconds() == 2500


async def test_text_that_no_window_could_hold_is_refused_before_it_is_tokenized(stub: Any, engine: FakeEngine) -> None:
    engine.max_context_tokens = 5
    most = 5 * CODEC.longest_token
    chat = pb.ChatInput(messages=[pb.ChatMessage(role="user"), pb.ChatMessage(role="user", content="a" * (most - 7))])
    too_long = asking("a" * (most + 1)), wpb.WorkerGenerateRequest(request_id="r", chat=chat)
    for request in too_long:
        code, message, details = await failure(stub.Generate(request))
        assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.OUT_OF_RANGE, "CONTEXT_TOO_LONG")
        assert message == f"{most + 1} characters are more than 5 tokens can hold"
    await hear(stub, asking("a" * most))
    assert len(engine.calls) == 1


async def test_a_bug_tells_the_client_nothing_but_where_it_was_logged(stub: Any, engine: FakeEngine) -> None:
    engine.script = [Failed(ZeroDivisionError("secret"))]
    code, message, _ = await failure(stub.Generate(asking()))
    assert code is grpc.StatusCode.INTERNAL
    assert message == "internal error; request r"


async def test_questions_about_a_history_reach_the_engine_and_its_answers_come_back(
    stub: Any, engine: FakeEngine
) -> None:
    history = wpb.History(tenant="t", token_ids=[5, 6], codec="int4")
    assert await stub.Park(wpb.ParkRequest(history=history, drop_host=True, block_ttl_s=9)) == wpb.ParkReply(
        redis_tokens=32, device_blocks_dropped=2, host_blocks_dropped=1, bytes_stored=999
    )
    assert await stub.Warm(wpb.WarmRequest(history=history)) == wpb.WarmReply(device_tokens=48, restored_tokens=16)
    assert await stub.Flush(wpb.FlushRequest(history=history)) == wpb.FlushReply()
    assert await stub.Locate(wpb.LocateRequest(history=history, with_redis=True)) == wpb.LocateReply(
        device_tokens=16, host_tokens=32, redis_tokens=48
    )
    assert await stub.Drop(wpb.DropRequest(history=history)) == wpb.DropReply(
        device_blocks=1, host_blocks=2, disk_blocks=4, redis_blocks=3
    )
    assert await stub.Erase(wpb.EraseRequest(tenant="t", with_redis=True)) == wpb.DropReply(
        device_blocks=5, host_blocks=6, disk_blocks=7, redis_blocks=8
    )
    assert await stub.Retain(wpb.RetainRequest(history=history, block_ttl_s=3)) == wpb.RetainReply(blocks=7)
    assert engine.asked == [
        ("park", "t", (5, 6), "int4", True, 9),
        ("warm", "t", (5, 6), "int4"),
        ("flush", "t", (5, 6), "int4"),
        ("locate", "t", (5, 6), "int4", True),
        ("drop", "t", (5, 6), "int4", False),
        ("erase", "t", True),
        ("retain", "t", (5, 6), "int4", 3),
    ]


async def test_a_front_end_without_codecs_asks_for_raw_blocks(stub: Any, engine: FakeEngine) -> None:
    await stub.Flush(wpb.FlushRequest(history=wpb.History(tenant="t", token_ids=[5])))
    assert engine.asked == [("flush", "t", (5,), "raw")]


async def test_a_codec_that_the_worker_does_not_know_is_refused_by_name(stub: Any) -> None:
    history = wpb.History(tenant="t", token_ids=[5], codec="jpeg")
    generate = asking()
    generate.history.codec = "jpeg"
    for call in (stub.Flush(wpb.FlushRequest(history=history)), stub.Generate(generate)):
        code, message, _ = await failure(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert message.startswith("history.codec: must be one of raw, lossless")


async def test_the_worker_describes_itself(stub: Any, engine: FakeEngine) -> None:
    assert await stub.Describe(wpb.DescribeRequest()) == wpb.DescribeReply(
        worker_id="w-1",
        model="preset:tiny",
        fingerprint="0102",
        max_context_tokens=4096,
        block_tokens=16,
        accepting=True,
        metrics_address="127.0.0.1:1",
        block_bytes=engine.layout.block_bytes,
        names_from=engine.names_from,
    )
    stats = await stub.GetStats(wpb.GetStatsRequest())
    assert stats.prompt_tokens == pb.TokensBySource(device=1, host=2, redis=3, computed=4)
    assert stats.host == pb.TierStats(blocks=6, capacity_blocks=20, bytes=600, capacity_bytes=2000)
    assert (stats.running, stats.waiting, stats.block_tokens) == (9, 10, 16)


async def test_tokens_are_turned_back_into_text_on_request(stub: Any) -> None:
    tokens = CODEC.encode("héllo", is_first=True)
    assert (await stub.Detokenize(wpb.DetokenizeRequest(token_ids=tokens))).text == "héllo"
    code, _, details = await failure(stub.Detokenize(wpb.DetokenizeRequest(token_ids=[1000])))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details["BadRequest"].field_violations[0].field == "token_ids"


async def test_texts_are_quoted_but_for_such_that_no_window_could_hold(stub: Any, engine: FakeEngine) -> None:
    most = engine.max_context_tokens * CODEC.longest_token
    texts = ["so <|end|>", "x" * (most + 1), "héllo"]
    quoted = (await stub.Quote(wpb.QuoteRequest(texts=texts))).texts
    assert [(one.text, one.tokens) for one in quoted] == [("so < |end|>", 11), ("", 0), ("héllo", 6)]


async def test_a_port_that_is_taken_is_an_error(engine: FakeEngine) -> None:
    service = WorkerService(engine, CODEC, worker_id="w-1", model="m")
    server, address = await start_server(service, "127.0.0.1")
    try:
        with pytest.raises(OSError, match="cannot listen"):
            await start_server(service, "127.0.0.1", int(address.rpartition(":")[2]))
    finally:
        await server.stop(grace=None)
        service.close()
        engine.close()


# Metrics


def scrape(address: str) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        text = response.read().decode()
    return {name: float(value) for name, value in re.findall(r"^(rekindle_\S+) (\S+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("kind", PlanKind)
def test_a_plan_arrives_with_its_receipt_and_is_shown(kind: PlanKind) -> None:
    plan = RestorePlan(kind=kind, predicted_ms=12.4, actual_ms=15.6, computed_instead_tokens=48)
    receipt = Receipt(device_tokens=0, host_tokens=0, redis_tokens=1, computed_tokens=48, plan=plan)
    call = GenerateCall(
        request_id="r", tenant="t", history=(1,), input=(2,) * 48, sampling=Sampling(), max_new_tokens=1
    )
    event = finished_event(
        call,
        Finished(FinishReason.LENGTH, receipt, 1),
        num_tokens=1,
        last_token_id=3,
        stop_string=None,
        worker_id="w-1",
    )
    shown = receipt_line(event.finished)
    assert f"plan {kind.name.lower().replace('_', ' ')}: 16 ms, 12 predicted, 48 tokens computed instead" in shown
    assert to_dict(event.finished.receipt)["plan"]["kind"] == f"PLAN_KIND_{kind.name}"


@pytest.mark.parametrize("reason", MissReason)
def test_every_reason_of_a_miss_has_its_word_in_the_protocol(reason: MissReason) -> None:
    assert pb.MissReason.Value(f"MISS_REASON_{reason.name}") == reason.value


def test_metrics_show_the_engines_figures_and_each_kind_of_turn(engine: FakeEngine) -> None:
    metrics = WorkerMetrics(engine.stats)
    address = f"127.0.0.1:{metrics.serve('127.0.0.1', 0)}"
    try:
        for device, host, redis in ((0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)):
            receipt = Receipt(
                device_tokens=device,
                host_tokens=host,
                redis_tokens=redis,
                computed_tokens=1,
                restored_bytes=64,
                ttft_ms=30,
                decode_ms=80,
                plan=RestorePlan(kind=PlanKind.BOTH_ENDS, predicted_ms=20, actual_ms=25, computed_instead_tokens=1),
            )
            metrics.turn_finished(receipt, completion_tokens=9)
        found = scrape(address)
    finally:
        metrics.close()
        engine.close()
    sources = [found[f'rekindle_prompt_tokens_total{{source="{s}"}}'] for s in ("device", "host", "redis", "computed")]
    assert sources == [1, 2, 3, 4]
    assert [found[f'rekindle_device_blocks{{state="{state}"}}'] for state in ("free", "used", "cached")] == [5, 3, 2]
    labels = '{codec="int8",source="redis",target="host"}'
    assert found[f"rekindle_moved_bytes_total{labels}"] == 200
    assert found[f"rekindle_moved_raw_bytes_total{labels}"] == 400
    assert found[f"rekindle_moved_seconds_total{labels}"] == 0.5
    assert found["rekindle_prefill_saved_seconds_total"] == 2.5
    assert found["rekindle_restored_bytes_total"] == 4 * 64
    assert found['rekindle_planned_seconds_total{kind="both_ends"}'] == pytest.approx(0.08)
    assert found['rekindle_planned_actual_seconds_total{kind="both_ends"}'] == pytest.approx(0.1)
    assert found["rekindle_stores_dropped_total"] == 7
    assert found["rekindle_evicted_then_needed_total"] == 8
    assert found['rekindle_queue_requests{state="waiting"}'] == 10
    assert found["rekindle_queue_tokens"] == 11
    assert found['rekindle_turned_away_requests_total{reason="deadline_unmeetable"}'] == 12
    for kind in ("new", "hot", "host", "redis"):
        assert found[f'rekindle_ttft_seconds_sum{{kind="{kind}"}}'] == pytest.approx(0.03)
        assert found[f'rekindle_tpot_seconds_bucket{{kind="{kind}",le="0.01"}}'] == 1
        assert found[f'rekindle_tpot_seconds_bucket{{kind="{kind}",le="0.005"}}'] == 0


async def test_a_text_that_fits_no_window_is_not_prefilled_and_others_are(stub: Any, engine: FakeEngine) -> None:
    engine.script = tokens_of("x")
    longest = engine.max_context_tokens * CODEC.longest_token
    texts = ["some words " * 9, "x" * (longest + 1), "other words " * 9]
    prefilled = await stub.Prefill(wpb.PrefillRequest(tenant="t", texts=texts, block_ttl_s=60))
    assert [*prefilled.tokens] == [len(CODEC.encode(text, is_first=False)) * (len(text) < longest) for text in texts]
    engine.refusal = ContextTooLong("with the reply")
    assert not any((await stub.Prefill(wpb.PrefillRequest(tenant="t", texts=texts[:1]))).tokens)


async def test_nothing_is_prefilled_for_a_model_that_inserts_nothing(stub: Any, engine: FakeEngine) -> None:
    engine.can_insert = False
    assert not any((await stub.Prefill(wpb.PrefillRequest(tenant="t", texts=["some words " * 9]))).tokens)
    assert not engine.calls
