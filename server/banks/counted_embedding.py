"""How much is embedded, how long that takes, and how often it fails: counted in front of whoever embeds."""

import asyncio
import time
from collections.abc import Sequence

from server.banks.embeds import Embeds
from server.embedding import Embedded
from server.metrics import FrontMetrics


class CountedEmbedding:
    """`Embeds` in front of another one."""

    def __init__(self, embedding: Embeds, metrics: FrontMetrics) -> None:
        self._embedding = embedding
        self._metrics = metrics

    async def embed(
        self,
        texts: Sequence[str],
        *,
        chunk_tokens: int = 0,
        overlap_tokens: int = 0,
        is_query: bool = False,
        prefer: str = "",
    ) -> Embedded:
        began_s, result, vectors = time.monotonic(), "failed", 0
        try:
            embedded = await self._embedding.embed(
                texts, chunk_tokens=chunk_tokens, overlap_tokens=overlap_tokens, is_query=is_query, prefer=prefer
            )
            result, vectors = "done", sum(map(len, embedded.texts))
            return embedded
        except asyncio.CancelledError:
            result = "cancelled"
            raise
        finally:
            kind = "question" if is_query else "text"
            self._metrics.embedding_ended(kind, result, vectors=vectors, seconds=time.monotonic() - began_s)
