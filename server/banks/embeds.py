"""What banks ask of whoever makes vectors: a `server.embedding.Embedding`, or a small one in tests."""

from collections.abc import Sequence
from typing import Protocol

from server.embedding import Embedded


class Embeds(Protocol):
    async def embed(
        self,
        texts: Sequence[str],
        *,
        chunk_tokens: int = 0,
        overlap_tokens: int = 0,
        is_query: bool = False,
        prefer: str = "",
    ) -> Embedded:
        """Raises NoWorker where nobody embeds."""
        ...
