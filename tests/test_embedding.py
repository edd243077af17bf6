"""Texts are embedded by whichever workers can: the front end's side, over real gRPC, with workers without a model."""

import asyncio
from collections.abc import AsyncIterator, Callable
from itertools import pairwise

import grpc
import numpy as np
import pytest

from cache_store.errors import InvalidRequest
from server.embedding import MAX_WHOLE_BYTES, Embedding
from server.errors import NoEmbedder, NoWorker, WorkerLost, WorkerRefused, WorkersLost
from server.status import failure_of
from tests.fake_embedding import DIM, EMBEDDER, vector_of
from tests.fake_worker import FakeWorker, FrontEnd, front_end
from worker.errors import Draining

WORDS = " ".join(f"word{number}" for number in range(30))


@pytest.fixture
async def front() -> AsyncIterator[FrontEnd]:
    async with front_end(3) as running:
        yield running


@pytest.fixture
def embedding(front: FrontEnd) -> Embedding:
    return Embedding(front.app.directory)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def until_seen(front: FrontEnd, embedder: str, worker_id: str = "0") -> None:
    """The front end knows of a worker's embedding model."""
    await until(lambda: front.app.directory.known()[int(worker_id)].description.embedder == embedder)


async def test_each_text_gets_its_vector_in_order(embedding: Embedding) -> None:
    texts = [f"text {number}" for number in range(200)]
    embedded = await embedding.embed(texts)
    assert (embedded.embedder, embedded.dim) == (EMBEDDER, DIM)
    assert [len(chunks) for chunks in embedded.texts] == [1] * 200
    for text, (chunk,) in zip(texts, embedded.texts, strict=True):
        assert (chunk.start, chunk.end, chunk.tokens, chunk.is_cut) == (0, len(text), 2, False)
        np.testing.assert_array_equal(chunk.vector, vector_of(text))


async def test_a_text_without_words_has_no_vector(embedding: Embedding) -> None:
    assert (await embedding.embed(["", "word", "..."])).texts[::2] == [[], []]
    assert (await embedding.embed([])).texts == []


async def test_a_long_text_is_sent_in_sections_and_its_chunks_lie_where_they_are_in_all_of_it(
    front: FrontEnd, embedding: Embedding
) -> None:
    text = "\n\n".join([f"paragraph {number} " + "and so on " * 400 for number in range(50)])
    (chunks,) = (await embedding.embed([text], chunk_tokens=100, overlap_tokens=10)).texts
    assert chunks[0].start == 0
    assert chunks[-1].end == len(text)
    assert all(later.start <= earlier.end for earlier, later in pairwise(chunks))
    for chunk in chunks:
        np.testing.assert_array_equal(chunk.vector, vector_of(text[chunk.start : chunk.end]))
    sent = [section for worker in front.workers.values() for request in worker.embedded for section in request.texts]
    assert all(section.startswith("paragraph") for section in sent)
    assert "".join(sorted(sent, key=text.index)) == text
    assert len([worker for worker in front.workers.values() if worker.embedded]) > 1, "one worker did it all"


async def test_what_a_text_is_for_reaches_the_worker(front: FrontEnd, embedding: Embedding) -> None:
    await embedding.embed(["who?"], is_query=True)
    (request,) = [request for worker in front.workers.values() for request in worker.embedded]
    assert request.is_query


@pytest.mark.parametrize("loss", ["killed", "draining", "broken"])
async def test_another_worker_embeds_what_one_can_not(front: FrontEnd, embedding: Embedding, loss: str) -> None:
    unlucky = front.workers["0"]
    if loss == "killed":
        await unlucky.kill()
    else:
        unlucky.refuse_with = Draining("leaving") if loss == "draining" else RuntimeError("out of memory")
    (chunks,) = (await embedding.embed([WORDS])).texts
    np.testing.assert_array_equal(chunks[0].vector, vector_of(WORDS))


async def test_texts_that_three_workers_were_lost_over_go_to_no_fourth() -> None:
    async with front_end(4) as front:
        for worker_id in "012":
            await front.kill(worker_id)
        with pytest.raises(WorkersLost):
            await Embedding(front.app.directory).embed([WORDS])
        assert not front.workers["3"].embedded


async def test_a_worker_that_refuses_the_texts_is_not_second_guessed(front: FrontEnd, embedding: Embedding) -> None:
    for worker in front.workers.values():
        worker.refuse_with = InvalidRequest("chunk_tokens", "too many")
    with pytest.raises(WorkerRefused, match="chunk_tokens"):
        await embedding.embed([WORDS], chunk_tokens=9000)
    assert sum(len(worker.embedded) for worker in front.workers.values()) == 1


async def test_where_no_worker_embeds_the_error_says_which_kind_of_none(front: FrontEnd, embedding: Embedding) -> None:
    for worker in front.workers.values():
        worker.embedder = ""
    for worker_id in front.workers:
        await until_seen(front, "", worker_id)
    with pytest.raises(NoEmbedder, match="embedding model") as caught:
        await embedding.embed([WORDS])
    assert failure_of(caught.value, "r").code is grpc.StatusCode.FAILED_PRECONDITION
    for worker_id in front.workers:
        await front.kill(worker_id)
        front.app.directory.suspect(front.app.directory.known()[int(worker_id)])
    with pytest.raises(NoWorker) as lost:
        await embedding.embed([WORDS])
    assert failure_of(lost.value, "r").code is grpc.StatusCode.UNAVAILABLE


async def test_all_vectors_of_a_call_are_of_one_model_the_preferred_one_if_it_is_there(
    front: FrontEnd, embedding: Embedding
) -> None:
    front.workers["0"].embedder = "beef"
    await until_seen(front, "beef")
    assert (await embedding.embed([WORDS] * 200)).embedder == EMBEDDER, "not the commonest"
    assert not front.workers["0"].embedded
    assert (await embedding.embed([WORDS], prefer="beef")).embedder == "beef"
    assert (await embedding.embed([WORDS], prefer="gone")).embedder == EMBEDDER


async def test_a_worker_whose_model_has_changed_meanwhile_is_not_believed(
    front: FrontEnd, embedding: Embedding
) -> None:
    front.workers["0"].embedder = "beef"  # the front end has not asked again
    embedded = await embedding.embed([WORDS] * 200)
    assert embedded.embedder == EMBEDDER
    assert len(embedded.texts) == 200


async def test_cancelling_stops_the_workers(front: FrontEnd, embedding: Embedding) -> None:
    for worker in front.workers.values():
        worker.may_embed.clear()
    task = asyncio.create_task(embedding.embed([WORDS]))
    asked = await _asked(front)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: asked.cancelled == 1)


async def test_a_frozen_worker_loses_the_texts_that_it_was_given(front: FrontEnd, embedding: Embedding) -> None:
    frozen = front.workers["0"]
    frozen.may_embed.clear()
    task = asyncio.create_task(embedding.embed([WORDS]))
    assert await _asked(front) is frozen
    front.app.directory.known()[0].client.abandon()
    assert len((await task).texts[0]) == 1


async def test_a_whole_text_without_end_is_refused(embedding: Embedding) -> None:
    with pytest.raises(InvalidRequest, match=r"texts\[1\]"):
        await embedding.embed(["short", "x" * (MAX_WHOLE_BYTES + 1)])


async def test_with_one_worker_that_is_lost_the_loss_is_what_is_said() -> None:
    async with front_end(1) as front:
        await front.kill("0")
        with pytest.raises((WorkerLost, NoWorker)) as caught:
            await Embedding(front.app.directory).embed([WORDS])
        assert failure_of(caught.value, "r").code is grpc.StatusCode.UNAVAILABLE


async def _asked(front: FrontEnd) -> FakeWorker:
    await until(lambda: any(worker.embedded for worker in front.workers.values()))
    return next(worker for worker in front.workers.values() if worker.embedded)
