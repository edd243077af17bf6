"""The worker's answers to Embed: texts checked, cut and embedded, a batch at a time, on a thread of their own.

The model is loaded when it is first needed. Calls take turns by batches, and questions come first: a turn waits for
them, and books take long.
"""

import asyncio
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final, Protocol, TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray

from cache_store.errors import InvalidRequest
from protos import rekindle_worker_pb2 as wpb
from worker.chunks import Passage, Span
from worker.errors import Overloaded
from worker.one_thread import OneThread

T = TypeVar("T")

MAX_TEXTS: Final = 256
MAX_BYTES: Final = 4 << 20
"""Of all texts of a call, in UTF-8."""
MAX_CALLS: Final = 64
"""That take turns at once; more are refused."""

_NICENESS: Final = 10
"""Of the thread: where cores are scarce, running turns come first."""
_RETRY_AFTER_S: Final = 1.0

_log = structlog.get_logger(__name__)


class EmbedderLike(Protocol):
    """A worker.model.embedder.Embedder. `passages` may be called from any thread, `vectors` from one."""

    @property
    def batch_tokens(self) -> int: ...
    def passages(self, text: str, *, chunk_tokens: int, overlap_tokens: int, is_query: bool) -> Sequence[Passage]: ...
    def vectors(self, passages: Sequence[Passage]) -> NDArray[np.float32]: ...


class EmbeddingService:
    """Lives on one event loop."""

    def __init__(self, name: str, dim: int, load: Callable[[], EmbedderLike]) -> None:
        """`name` is the digest of the model that `load` (on a thread, once) brings into memory."""
        self.name = name
        self.dim = dim
        self._load = load
        self._embedder: EmbedderLike | None = None
        self._thread = OneThread("embed")
        self._calls = 0

    async def embed(self, request: wpb.EmbedRequest) -> wpb.EmbedReply:
        """Cancelling it takes effect within a batch. Raises InvalidRequest, Overloaded, ModelRefused."""
        _check(request)
        if self._calls >= MAX_CALLS:
            raise Overloaded(f"{self._calls} calls are being embedded, {MAX_CALLS} may be", _RETRY_AFTER_S)
        self._calls += 1
        try:
            return await self._embed(request)
        finally:
            self._calls -= 1

    async def _embed(self, request: wpb.EmbedRequest) -> wpb.EmbedReply:
        embedder = self._embedder
        if embedder is None:
            embedder = await self._in_thread(self._loaded, urgent=request.is_query)
        cut = partial(
            embedder.passages,
            chunk_tokens=request.chunk_tokens,
            overlap_tokens=request.overlap_tokens,
            is_query=request.is_query,
        )
        by_text = [await asyncio.to_thread(cut, text) for text in request.texts]
        passages = [passage for of_text in by_text for passage in of_text]
        vectors = np.empty((len(passages), self.dim), "<f4")
        for batch in batches([len(passage.token_ids) for passage in passages], embedder.batch_tokens):
            compute = partial(embedder.vectors, [passages[at] for at in batch])
            vectors[batch] = await self._in_thread(compute, urgent=request.is_query)
        return self._reply(request, by_text, vectors)

    def _reply(
        self, request: wpb.EmbedRequest, by_text: Sequence[Sequence[Passage]], vectors: NDArray[np.float32]
    ) -> wpb.EmbedReply:
        reply, rows, is_whole = wpb.EmbedReply(embedder=self.name), iter(vectors), not request.chunk_tokens
        for text, of_text in zip(request.texts, by_text, strict=True):
            reply.texts.add(chunks=[_chunk(text, at.span, next(rows), is_whole=is_whole) for at in of_text])
        return reply

    def close(self) -> None:
        """Wait for the batch that runs. Every call must have ended."""
        self._thread.close()

    def _loaded(self) -> EmbedderLike:
        if self._embedder is None:
            self._embedder = self._load()
            _step_back()  # now: threads that loading has started, the tokenizers', serve others too
            _log.info("embedding model loaded", embedder=self.name)
        return self._embedder

    async def _in_thread(self, work: Callable[[], T], *, urgent: bool) -> T:
        return await asyncio.wrap_future(self._thread.submit(work, urgent=urgent))


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places in `lengths`, in batches of like lengths: at most `batch_tokens` with the padding, or one alone."""
    batch: list[int] = []
    for at in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[at] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch


def _check(request: wpb.EmbedRequest) -> None:
    if len(request.texts) > MAX_TEXTS:
        raise InvalidRequest("texts", f"at most {MAX_TEXTS}, got {len(request.texts)}")
    num_bytes = sum(len(text.encode()) for text in request.texts)
    if num_bytes > MAX_BYTES:
        raise InvalidRequest("texts", f"at most {MAX_BYTES:,} bytes in all, got {num_bytes:,}")
    if 2 * request.overlap_tokens > request.chunk_tokens:
        raise InvalidRequest("overlap_tokens", f"at most half of chunk_tokens, got {request.overlap_tokens}")


def _chunk(text: str, span: Span, vector: NDArray[np.float32], *, is_whole: bool) -> wpb.EmbeddedChunk:
    return wpb.EmbeddedChunk(
        start=span.start,
        end=span.end,
        tokens=span.last - span.first,
        vector=vector.tobytes(),
        is_cut=is_whole and span.end < len(text),
    )


def _step_back() -> None:
    """Give the calling thread a lower priority than its process has."""
    if sys.platform == "linux":  # elsewhere it would be the process's
        os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS)
