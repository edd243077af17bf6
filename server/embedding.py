"""Texts as vectors, by whichever workers have an embedding model. Knows workers, and nothing of banks.

A call is cut in batches, several of which are under way at once, each on the least busy worker. All vectors of a call
are of one embedding model.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple

import grpc
import numpy as np
import structlog
from numpy.typing import NDArray

from cache_store.errors import InvalidRequest, ServingError
from protos import rekindle_worker_pb2 as wpb
from server.directory import Worker, WorkerDirectory
from server.errors import NoEmbedder, NoWorker, WorkerFault, WorkerLost, WorkerRefused, WorkersLost

MAX_WHOLE_BYTES: Final = 1 << 20
"""Of a text (UTF-8) that is not to be cut in chunks."""

_SECTION_CHARACTERS: Final = 32_768
"""A longer text that is cut in chunks is sent in sections: some seconds of one worker's thread each."""
_BATCH_TEXTS: Final = 64
_BATCH_CHARACTERS: Final = 65_536
_BATCHES_AT_ONCE: Final = 4
_ANSWER_S: Final = 60.0
_CHARACTERS_PER_S: Final = 500.0
"""A slow worker's that has others waiting: a batch that takes longer than this allows has failed."""
_ELSEWHERE: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.FAILED_PRECONDITION,  # it can't load its model
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
"""Another worker may do better."""
_MOST_LOST: Final = 3
"""Workers that one batch may lose: what kills whoever gets it is not given to all of them."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """A part of a text, and its vector."""

    start: int
    end: int
    """Characters [start, end) of the text."""
    tokens: int
    """Of the embedding model's tokenizer, without its special ones."""
    vector: NDArray[np.float32]
    """[dim], of unit length; read-only."""
    is_cut: bool = False
    """The text was longer than the model reads: what is behind `end` has no part in the vector."""


@dataclass(frozen=True, slots=True)
class Embedded:
    embedder: str
    """Digest of the embedding model: only vectors of the same one can be compared."""
    dim: int
    texts: list[list[Chunk]]
    """Of each text its chunks, in order: one where the text was to be left whole, none where it has no token."""


class _Piece(NamedTuple):
    """What is sent as one text."""

    text_index: int
    start: int
    """Where in that text it begins."""
    text: str


class Embedding:
    """Used on one event loop. It opens nothing, and so has nothing to close."""

    def __init__(self, directory: WorkerDirectory) -> None:
        self._directory = directory
        self._in_flight: Counter[str] = Counter()
        """Batches by worker."""

    async def embed(
        self,
        texts: Sequence[str],
        *,
        chunk_tokens: int = 0,
        overlap_tokens: int = 0,
        is_query: bool = False,
        prefer: str = "",
    ) -> Embedded:
        """Vectors for each text: for chunks of `chunk_tokens`, or, with 0, for as much of its front as the model reads.

        `is_query` says that the texts are questions, not what is to be found. Of several embedding models among the
        workers (in the midst of an upgrade, say) it is `prefer` that counts, if it is among them, else the commonest.
        Cancelling it stops the workers. Raises InvalidRequest, NoWorker (NoEmbedder where workers have no embedding
        model), WorkerLost, WorkerRefused, WorkerFault.
        """
        embedder, dim = self._embedder(prefer)
        options = wpb.EmbedRequest(chunk_tokens=chunk_tokens, overlap_tokens=overlap_tokens, is_query=is_query)
        pieces = [piece for index, text in enumerate(texts) for piece in _pieces(index, text, whole=not chunk_tokens)]
        places = asyncio.Semaphore(_BATCHES_AT_ONCE)
        tasks = [
            asyncio.create_task(self._embed_batch(batch, options, embedder, dim, places)) for batch in _batches(pieces)
        ]
        try:
            done = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        chunks: list[list[Chunk]] = [[] for _ in texts]
        for piece, of_piece in zip(pieces, (of_piece for batch in done for of_piece in batch), strict=True):
            chunks[piece.text_index].extend(of_piece)
        return Embedded(embedder, dim, chunks)

    async def _embed_batch(
        self, batch: Sequence[_Piece], options: wpb.EmbedRequest, embedder: str, dim: int, places: asyncio.Semaphore
    ) -> list[list[Chunk]]:
        request = wpb.EmbedRequest(texts=[piece.text for piece in batch])
        request.MergeFrom(options)
        timeout_s = _ANSWER_S + sum(len(piece.text) for piece in batch) / _CHARACTERS_PER_S
        tried: set[str] = set()
        last: ServingError | None = None
        async with places:
            while len(tried) < _MOST_LOST:
                try:
                    worker = self._least_busy(embedder, but=tried)
                except NoWorker as error:
                    raise last or error from error
                try:
                    with self._working(worker):
                        reply = await worker.client.embed(request, timeout_s=timeout_s)
                    return _chunks_of(reply, batch, embedder, dim, worker.worker_id)
                except WorkerLost as error:
                    self._directory.suspect(worker)
                    last = error
                except WorkerRefused as error:
                    if error.code not in _ELSEWHERE:
                        raise
                    last = error
                tried.add(worker.worker_id)
                _log.warning("texts go to another worker", worker=worker.worker_id, error=str(last))
        if isinstance(last, WorkerLost):
            raise WorkersLost(f"{len(tried)} workers were lost over these texts") from last
        assert last is not None, "a loop that was left without an error"
        raise last

    def _embedder(self, prefer: str) -> tuple[str, int]:
        """The embedding model for a call, and its dimension."""
        able = [worker for worker in self._directory.living() if worker.accepting]
        models = Counter((worker.description.embedder, worker.description.embedding_dim) for worker in able)
        having = sorted(model for model in models if model[0])
        if not able:
            raise NoWorker("no worker accepts work now")
        if not having:
            raise NoEmbedder("no worker has an embedding model (their setting embedder is none)")
        return max(having, key=lambda model: (model[0] == prefer, models[model]))

    def _least_busy(self, embedder: str, *, but: set[str]) -> Worker:
        able = [
            worker
            for worker in self._directory.living()
            if worker.accepting and worker.worker_id not in but and worker.description.embedder == embedder
        ]
        if not able:
            raise NoWorker("no worker with the embedding model accepts work now")
        return min(able, key=lambda worker: (self._in_flight[worker.worker_id], worker.in_flight, worker.worker_id))

    @contextmanager
    def _working(self, worker: Worker) -> Iterator[None]:
        self._in_flight[worker.worker_id] += 1
        try:
            yield
        finally:
            self._in_flight[worker.worker_id] -= 1
            if not self._in_flight[worker.worker_id]:
                del self._in_flight[worker.worker_id]


def _pieces(text_index: int, text: str, *, whole: bool) -> Iterator[_Piece]:
    """The text, or its sections. Chunks don't reach over the end of a section."""
    if whole and len(text.encode()) > MAX_WHOLE_BYTES:
        raise InvalidRequest(f"texts[{text_index}]", f"at most {MAX_WHOLE_BYTES:,} bytes where it is not cut in chunks")
    start = 0
    while start < len(text):
        end = len(text) if whole else _section_end(text, start)
        yield _Piece(text_index, start, text[start:end])
        start = end


def _section_end(text: str, start: int) -> int:
    """Where a paragraph ends, a line, or a word: what comes last in the second half of what a section may have."""
    end = start + _SECTION_CHARACTERS
    if end >= len(text):
        return len(text)
    for mark in ("\n\n", "\n", " "):
        place = text.rfind(mark, start + _SECTION_CHARACTERS // 2, end)
        if place >= 0:
            return place + len(mark)
    return end


def _batches(pieces: Sequence[_Piece]) -> Iterator[Sequence[_Piece]]:
    batch: list[_Piece] = []
    characters = 0
    for piece in pieces:
        if batch and (len(batch) == _BATCH_TEXTS or characters + len(piece.text) > _BATCH_CHARACTERS):
            yield batch
            batch, characters = [], 0
        batch.append(piece)
        characters += len(piece.text)
    if batch:
        yield batch


def _chunks_of(
    reply: wpb.EmbedReply, batch: Sequence[_Piece], embedder: str, dim: int, worker_id: str
) -> list[list[Chunk]]:
    """Each piece's chunks, by their places in its text. Raises WorkerLost where another model answered."""
    if reply.embedder != embedder:
        raise WorkerLost(f"worker {worker_id} has another embedding model than it had")
    if len(reply.texts) != len(batch):
        raise WorkerFault(f"worker {worker_id} embedded {len(reply.texts)} texts of {len(batch)}")
    return [
        [_chunk_of(chunk, piece.start, dim, worker_id) for chunk in text.chunks]
        for piece, text in zip(batch, reply.texts, strict=True)
    ]


def _chunk_of(message: wpb.EmbeddedChunk, offset: int, dim: int, worker_id: str) -> Chunk:
    vector = np.frombuffer(message.vector, "<f4") if len(message.vector) % 4 == 0 else None
    if vector is None or len(vector) != dim:
        raise WorkerFault(f"worker {worker_id} answered {len(message.vector)} bytes for a vector of {dim} numbers")
    return Chunk(
        start=message.start + offset,
        end=message.end + offset,
        tokens=message.tokens,
        vector=vector,
        is_cut=message.is_cut,
    )
