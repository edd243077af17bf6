"""A worker's Embed over real gRPC: around a scripted model, then the default one under a front end's Embedding."""

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import numpy as np
import pytest
from numpy.typing import NDArray

from protos import rekindle_worker_pb2 as wpb
from protos.rekindle_worker_pb2_grpc import WorkerStub
from server.directory import StaticAddresses, WorkerDirectory
from server.embedding import Embedding
from tests.fake_engine import FakeEngine
from tests.fake_worker import details_of, field_of
from worker.app import WorkerApp
from worker.chunks import Passage, Span
from worker.config import WorkerConfig
from worker.embedding_service import MAX_BYTES, MAX_CALLS, MAX_TEXTS, EmbeddingService, batches
from worker.errors import ModelRefused
from worker.model.presets_tokenizer import byte_tokenizer
from worker.service import WorkerService, start_server
from worker.text import TextCodec


class LetterModel:
    """A token is a character; a vector says which letter a passage begins with, and how long it is."""

    batch_tokens = 8

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        """Lengths of the passages of each."""
        self.niceness = 0
        """Of the thread that computed the last one."""
        self.may_run = threading.Event()
        self.may_run.set()

    def passages(self, text: str, *, chunk_tokens: int, overlap_tokens: int, is_query: bool) -> list[Passage]:
        size = chunk_tokens or 8
        starts = range(0, len(text) if chunk_tokens else min(1, len(text)), size)
        spans = [Span(start, min(start + size, len(text)), start, min(start + size, len(text))) for start in starts]
        return [Passage(span, [ord(letter) for letter in text[span.start : span.end]]) for span in spans]

    def vectors(self, passages: Sequence[Passage]) -> NDArray[np.float32]:
        assert self.may_run.wait(20)
        self.niceness = os.getpriority(os.PRIO_PROCESS, 0)
        self.batches.append([len(passage.token_ids) for passage in passages])
        return np.array([[passage.token_ids[0], len(passage.token_ids)] for passage in passages], np.float32)


@asynccontextmanager
async def served(embedding: EmbeddingService | None) -> AsyncIterator[Any]:
    engine = FakeEngine()
    codec = TextCodec(byte_tokenizer(1000))
    service = WorkerService(engine, codec, worker_id="w-1", model="preset:tiny", embedding=embedding)
    server, address = await start_server(service, "127.0.0.1")
    async with grpc.aio.insecure_channel(address) as channel:
        yield WorkerStub(channel)  # type: ignore[no-untyped-call]
    engine.close()
    await server.stop(grace=1.0)
    service.close()


@pytest.fixture
def model() -> LetterModel:
    return LetterModel()


@pytest.fixture
async def stub(model: LetterModel) -> AsyncIterator[Any]:
    async with served(EmbeddingService("beef", 2, lambda: model)) as calls:
        yield calls


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_texts_come_back_in_order_whatever_order_they_were_computed_in(stub: Any, model: LetterModel) -> None:
    texts = ["ccc", "", "aaaaaaaaaaaa", "b", "dd"]
    reply = await stub.Embed(wpb.EmbedRequest(texts=texts))
    assert reply.embedder == "beef"
    found = [[np.frombuffer(chunk.vector, "<f4").tolist() for chunk in text.chunks] for text in reply.texts]
    assert found == [[[ord("c"), 3]], [], [[ord("a"), 8]], [[ord("b"), 1]], [[ord("d"), 2]]]
    assert model.batches == [[1, 2], [3], [8]], "not by length, or too much in one batch"
    assert [chunk.is_cut for text in reply.texts for chunk in text.chunks] == [False, True, False, False]


async def test_a_text_in_chunks_says_where_each_is(stub: Any) -> None:
    reply = await stub.Embed(wpb.EmbedRequest(texts=["abcdefgh"], chunk_tokens=3, overlap_tokens=1))
    (text,) = reply.texts
    assert [(chunk.start, chunk.end, chunk.tokens, chunk.is_cut) for chunk in text.chunks] == [
        (0, 3, 3, False),
        (3, 6, 3, False),
        (6, 8, 2, False),
    ]


async def test_the_description_names_a_model_that_is_not_loaded_yet() -> None:
    loads = []

    def load() -> LetterModel:
        loads.append(1)
        return LetterModel()

    async with served(EmbeddingService("beef", 2, load)) as stub:
        description = await stub.Describe(wpb.DescribeRequest())
        assert (description.embedder, description.embedding_dim, loads) == ("beef", 2, [])
        await asyncio.gather(*(stub.Embed(wpb.EmbedRequest(texts=["a"])) for _ in range(3)))
        assert loads == [1]


async def test_a_worker_without_a_model_says_so() -> None:
    async with served(None) as stub:
        description = await stub.Describe(wpb.DescribeRequest())
        assert (description.embedder, description.embedding_dim) == ("", 0)
        error = await refused(stub.Embed(wpb.EmbedRequest(texts=["a"])))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "no embedding model" in (error.details() or "")


async def test_a_model_that_can_not_be_loaded_is_tried_again_by_the_next_call(model: LetterModel) -> None:
    problems = [ModelRefused("the disk is gone")]

    def load() -> LetterModel:
        if problems:
            raise problems.pop()
        return model

    async with served(EmbeddingService("beef", 2, load)) as stub:
        error = await refused(stub.Embed(wpb.EmbedRequest(texts=["a"])))
        assert (error.code(), error.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "the disk is gone")
        assert len((await stub.Embed(wpb.EmbedRequest(texts=["a"]))).texts) == 1


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (wpb.EmbedRequest(texts=["a"] * (MAX_TEXTS + 1)), "texts"),
        (wpb.EmbedRequest(texts=["a" * MAX_BYTES, "b"]), "texts"),
        (wpb.EmbedRequest(texts=["a"], chunk_tokens=3, overlap_tokens=2), "overlap_tokens"),
        (wpb.EmbedRequest(texts=["a"], overlap_tokens=1), "overlap_tokens"),
    ],
)
async def test_bad_requests_name_their_field(stub: Any, request_: wpb.EmbedRequest, field: str) -> None:
    error = await refused(stub.Embed(request_))
    assert (error.code(), field_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_a_short_text_does_not_wait_for_a_long_one(stub: Any, model: LetterModel) -> None:
    model.may_run.clear()
    long = asyncio.create_task(_embed(stub, "x" * 800))
    await asyncio.sleep(0.05)
    short = asyncio.create_task(_embed(stub, "y"))
    await asyncio.sleep(0.05)
    model.may_run.set()
    await short
    assert not long.done()
    await long


async def test_a_question_comes_before_texts_that_wait(stub: Any, model: LetterModel) -> None:
    model.may_run.clear()
    texts = [asyncio.create_task(_embed(stub, "x" * 16)) for _ in range(5)]
    await asyncio.sleep(0.1)
    question = stub.Embed(wpb.EmbedRequest(texts=["y?"], is_query=True))
    await asyncio.sleep(0.1)
    model.may_run.set()
    await question
    await asyncio.gather(*texts)
    assert [2] in model.batches[:2], "not right after the batch that ran"


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
async def test_where_cores_are_scarce_turns_come_before_embeddings(stub: Any, model: LetterModel) -> None:
    await _embed(stub, "x")
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert model.niceness == min(own + 10, 19)
    await _embed(stub, "y")
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


async def test_cancelling_stops_after_the_batch_that_runs(stub: Any, model: LetterModel) -> None:
    model.may_run.clear()
    call = stub.Embed(wpb.EmbedRequest(texts=["x" * 800], chunk_tokens=8))
    await asyncio.sleep(0.1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.sleep(0.05)
    model.may_run.set()
    await stub.Embed(wpb.EmbedRequest(texts=["y"]))
    assert len(model.batches) <= 2


async def test_more_calls_than_may_take_turns_are_told_to_come_back(stub: Any, model: LetterModel) -> None:
    model.may_run.clear()
    calls = [asyncio.create_task(_embed(stub, "x")) for _ in range(MAX_CALLS)]
    await asyncio.sleep(0.2)
    error = await refused(stub.Embed(wpb.EmbedRequest(texts=["y"])))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert any(type(detail).__name__ == "RetryInfo" for detail in details_of(error))
    model.may_run.set()
    await asyncio.gather(*calls)


def test_batches_waste_little_on_padding_and_hold_everything_once() -> None:
    lengths = [5, 1, 9, 1, 5, 20]
    found = list(batches(lengths, 10))
    assert found == [[1, 3], [0, 4], [2], [5]]
    assert list(batches([], 10)) == []


async def test_a_front_end_finds_by_the_default_model_what_was_meant() -> None:
    config = WorkerConfig(
        model="preset:tiny", redis_url="", device_cache_bytes=8 << 20, host_cache_bytes=8 << 20, self_measure_s=0
    )
    app = await WorkerApp.start("w-1", config)
    addresses = StaticAddresses({"w-1": app.address})
    directory = WorkerDirectory(addresses, poll_s=0.1, silence_s=5.0, max_message_bytes=1 << 24)
    try:
        await directory.start()
        embedding = Embedding(directory)
        text = "The cat slept on the sofa all day. " * 20 + "The launch code of the rocket is 4711. " * 8
        embedded = await embedding.embed([text], chunk_tokens=64, overlap_tokens=8)
        question = (await embedding.embed(["How do I start the rocket?"], is_query=True)).texts[0][0]
    finally:
        await directory.aclose()
        await app.stop(within_s=1)
    assert embedded.dim == 384
    chunks = embedded.texts[0]
    best = max(chunks, key=lambda chunk: float(chunk.vector @ question.vector))
    assert "4711" in text[best.start : best.end]
    assert sum("4711" not in text[chunk.start : chunk.end] for chunk in chunks) >= 2


async def _embed(stub: Any, text: str) -> wpb.EmbedReply:
    reply: wpb.EmbedReply = await stub.Embed(wpb.EmbedRequest(texts=[text], chunk_tokens=8))
    return reply
