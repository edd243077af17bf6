"""Texts are embedded by whichever workers can: the front end's side, over real gRPC, with workers without a model."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise

import grpc
import numpy as np
import pytest

from cache_store.errors import InvalidRequest
from server.directory import StaticAddresses, WorkerDirectory
from server.embedding import MAX_WHOLE_BYTES, Embedding
from server.errors import NoEmbedder, NoWorker, WorkerLost, WorkerRefused, WorkersLost
from server.status import failure_of
from tests.fake_embedding import DIM, EMBEDDER, vector_of
from tests.fake_worker import FakeWorker
from worker.errors import Draining, ModelRefused

WORDS = " ".join(f"word{number}" for number in range(30))


class Workers:
    """Fake workers by id, and the directory through which they are found."""

    def __init__(self, by_id: Mapping[str, FakeWorker], directory: WorkerDirectory) -> None:
        self.by_id = by_id
        self.directory = directory

    @property
    def asked(self) -> list[FakeWorker]:
        return [worker for worker in self.by_id.values() if worker.embedded]

    async def until_seen(self, embedder: str, *worker_ids: str) -> None:
        """The front end knows of these workers' embedding model."""
        seen = [worker for worker in self.directory.known() if worker.worker_id in worker_ids]
        await until(lambda: all(worker.description.embedder == embedder for worker in seen))


@asynccontextmanager
async def running(number: int) -> AsyncIterator[Workers]:
    by_id = {str(at): FakeWorker(str(at)) for at in range(number)}
    async with AsyncExitStack() as stack:
        for worker in by_id.values():
            await worker.start()
            stack.push_async_callback(worker.kill)
        addresses = StaticAddresses({worker_id: worker.address for worker_id, worker in by_id.items()})
        directory = WorkerDirectory(addresses, poll_s=0.1, silence_s=5.0, max_message_bytes=1 << 24)
        stack.push_async_callback(directory.aclose)
        await directory.start()
        yield Workers(by_id, directory)


@pytest.fixture
async def workers() -> AsyncIterator[Workers]:
    async with running(3) as started:
        yield started


@pytest.fixture
def embedding(workers: Workers) -> Embedding:
    return Embedding(workers.directory)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


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
    workers: Workers, embedding: Embedding
) -> None:
    text = "\n\n".join([f"paragraph {number} " + "and so on " * 400 for number in range(20)])
    (chunks,) = (await embedding.embed([text], chunk_tokens=100, overlap_tokens=10)).texts
    assert chunks[0].start == 0
    assert chunks[-1].end == len(text)
    assert all(later.start <= earlier.end for earlier, later in pairwise(chunks))
    for chunk in chunks:
        np.testing.assert_array_equal(chunk.vector, vector_of(text[chunk.start : chunk.end]))
    sent = [section for worker in workers.by_id.values() for request in worker.embedded for section in request.texts]
    assert all(section.startswith("paragraph") for section in sent)
    assert "".join(sorted(sent, key=text.index)) == text
    assert len(workers.asked) > 1, "one worker did it all"


async def test_what_a_text_is_for_reaches_the_worker(workers: Workers, embedding: Embedding) -> None:
    await embedding.embed(["who?"], is_query=True)
    (request,) = [request for worker in workers.by_id.values() for request in worker.embedded]
    assert request.is_query


@pytest.mark.parametrize("loss", ["killed", "draining", "broken", "without its model"])
async def test_another_worker_embeds_what_one_can_not(workers: Workers, embedding: Embedding, loss: str) -> None:
    unlucky = workers.by_id["0"]
    if loss == "killed":
        await unlucky.kill()
    else:
        unlucky.refuse_with = {
            "draining": Draining("leaving"),
            "broken": RuntimeError("out of memory"),
            "without its model": ModelRefused("the disk is gone"),
        }[loss]
    (chunks,) = (await embedding.embed([WORDS])).texts
    np.testing.assert_array_equal(chunks[0].vector, vector_of(WORDS))


async def test_texts_that_three_workers_were_lost_over_go_to_no_fourth() -> None:
    async with running(4) as workers:
        for worker_id in "012":
            await workers.by_id[worker_id].kill()
        with pytest.raises(WorkersLost):
            await Embedding(workers.directory).embed([WORDS])
        assert not workers.by_id["3"].embedded


async def test_a_worker_that_refuses_the_texts_is_not_second_guessed(workers: Workers, embedding: Embedding) -> None:
    for worker in workers.by_id.values():
        worker.refuse_with = InvalidRequest("chunk_tokens", "too many")
    with pytest.raises(WorkerRefused, match="chunk_tokens"):
        await embedding.embed([WORDS], chunk_tokens=9000)
    assert sum(len(worker.embedded) for worker in workers.by_id.values()) == 1


async def test_where_no_worker_embeds_the_error_says_which_kind_of_none(workers: Workers, embedding: Embedding) -> None:
    for worker in workers.by_id.values():
        worker.embedder = ""
    await workers.until_seen("", *workers.by_id)
    with pytest.raises(NoEmbedder, match="embedding model") as caught:
        await embedding.embed([WORDS])
    assert failure_of(caught.value, "r").code is grpc.StatusCode.FAILED_PRECONDITION
    for worker_id in workers.by_id:
        await workers.by_id[worker_id].kill()
        workers.directory.suspect(workers.directory.known()[int(worker_id)])
    with pytest.raises(NoWorker) as lost:
        await embedding.embed([WORDS])
    assert failure_of(lost.value, "r").code is grpc.StatusCode.UNAVAILABLE


async def test_all_vectors_of_a_call_are_of_one_model_the_preferred_one_if_it_is_there(
    workers: Workers, embedding: Embedding
) -> None:
    workers.by_id["0"].embedder = "beef"
    await workers.until_seen("beef", "0")
    assert (await embedding.embed([WORDS] * 200)).embedder == EMBEDDER, "not the commonest"
    assert not workers.by_id["0"].embedded
    assert (await embedding.embed([WORDS], prefer="beef")).embedder == "beef"
    assert (await embedding.embed([WORDS], prefer="gone")).embedder == EMBEDDER


async def test_a_worker_whose_model_has_changed_meanwhile_is_not_believed(
    workers: Workers, embedding: Embedding
) -> None:
    workers.by_id["0"].embedder = "beef"  # the front end has not asked again
    embedded = await embedding.embed([WORDS] * 200)
    assert embedded.embedder == EMBEDDER
    assert len(embedded.texts) == 200


async def test_cancelling_stops_the_workers(workers: Workers, embedding: Embedding) -> None:
    for worker in workers.by_id.values():
        worker.may_embed.clear()
    task = asyncio.create_task(embedding.embed([WORDS]))
    asked = await _asked(workers)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: asked.cancelled == 1)


async def test_a_frozen_worker_loses_the_texts_that_it_was_given(workers: Workers, embedding: Embedding) -> None:
    frozen = workers.by_id["0"]
    frozen.may_embed.clear()
    task = asyncio.create_task(embedding.embed([WORDS]))
    assert await _asked(workers) is frozen
    workers.directory.known()[0].client.abandon()
    assert len((await task).texts[0]) == 1


async def test_a_whole_text_without_end_is_refused(embedding: Embedding) -> None:
    with pytest.raises(InvalidRequest, match=r"texts\[1\]"):
        await embedding.embed(["short", "x" * (MAX_WHOLE_BYTES + 1)])


async def test_with_one_worker_that_is_lost_the_loss_is_what_is_said() -> None:
    async with running(1) as workers:
        await workers.by_id["0"].kill()
        with pytest.raises((WorkerLost, NoWorker)) as caught:
            await Embedding(workers.directory).embed([WORDS])
        assert failure_of(caught.value, "r").code is grpc.StatusCode.UNAVAILABLE


async def _asked(workers: Workers) -> FakeWorker:
    await until(lambda: bool(workers.asked))
    return workers.asked[0]
