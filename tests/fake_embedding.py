"""Embeddings without a model: texts with the same words have vectors close to each other. A token is a word."""

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from protos import rekindle_worker_pb2 as wpb
from server.embedding import Chunk, Embedded

DIM = 64
EMBEDDER = "fa4e"


def vector_of(text: str, dim: int = DIM) -> NDArray[np.float32]:
    """[dim], of unit length: the sum of the words' own directions, which are nearly at right angles."""
    words = re.findall(r"\w+", text.lower()) or [text]
    total = np.sum([_direction(word, dim) for word in words], axis=0)
    return np.asarray(total / max(np.linalg.norm(total), 1e-12), np.float32)


def chunks_of(text: str, *, chunk_tokens: int = 0, overlap_tokens: int = 0, dim: int = DIM) -> list[Chunk]:
    """As a worker cuts: words with what follows them, all of the text, in order."""
    starts = [match.start() for match in re.finditer(r"\w+", text)]
    if not starts:
        return []
    bounds = [0, *starts[1:], len(text)]
    step = max(1, chunk_tokens - overlap_tokens)
    size = chunk_tokens or len(starts)
    chunks = []
    for first in range(0, max(1, len(starts) - overlap_tokens) if chunk_tokens else 1, step):
        last = min(first + size, len(starts))
        start, end = bounds[first], bounds[last]
        chunks.append(Chunk(start, end, last - first, vector_of(text[start:end], dim)))
    return chunks


def embedded(text: str, request: wpb.EmbedRequest) -> wpb.EmbeddedText:
    """What a worker answers for one text."""
    cut = chunks_of(text, chunk_tokens=request.chunk_tokens, overlap_tokens=request.overlap_tokens)
    return wpb.EmbeddedText(
        chunks=[
            wpb.EmbeddedChunk(
                start=chunk.start, end=chunk.end, tokens=chunk.tokens, vector=chunk.vector.astype("<f4").tobytes()
            )
            for chunk in cut
        ]
    )


class FakeEmbedding:
    """In the place of a server.embedding.Embedding, without workers."""

    def __init__(self, embedder: str = EMBEDDER, dim: int = DIM) -> None:
        self.embedder = embedder
        self.dim = dim
        self.error: Exception | None = None
        """Raised by the next calls."""
        self.texts: list[str] = []
        """All that were embedded."""

    async def embed(
        self,
        texts: Sequence[str],
        *,
        chunk_tokens: int = 0,
        overlap_tokens: int = 0,
        is_query: bool = False,
        prefer: str = "",
    ) -> Embedded:
        if self.error is not None:
            raise self.error
        self.texts.extend(texts)
        cut = [
            chunks_of(text, chunk_tokens=chunk_tokens, overlap_tokens=overlap_tokens, dim=self.dim) for text in texts
        ]
        return Embedded(self.embedder, self.dim, cut)


@lru_cache(4096)
def _direction(word: str, dim: int) -> NDArray[np.float64]:
    seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
    return np.random.default_rng(seed).standard_normal(dim)
