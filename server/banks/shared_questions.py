"""A question that several banks are asked at once is embedded once: a turn asks all of its session's banks."""

import asyncio
from collections.abc import Sequence

from server.banks.embeds import Embeds
from server.embedding import Embedded


class _Asked:
    def __init__(self, answer: "asyncio.Task[Embedded]") -> None:
        self.answer = answer
        self.waiting = 0


class SharedQuestions:
    """`Embeds` in front of another one, on one event loop. What nobody waits for any more is given up."""

    def __init__(self, embedding: Embeds) -> None:
        self._embedding = embedding
        self._asked: dict[tuple[str, ...], _Asked] = {}

    async def embed(
        self,
        texts: Sequence[str],
        *,
        chunk_tokens: int = 0,
        overlap_tokens: int = 0,
        is_query: bool = False,
        prefer: str = "",
    ) -> Embedded:
        if not is_query:
            return await self._embedding.embed(
                texts, chunk_tokens=chunk_tokens, overlap_tokens=overlap_tokens, prefer=prefer
            )
        key = (prefer, *texts)
        asked = self._asked.get(key)
        if asked is None:
            answer = asyncio.create_task(self._embedding.embed(texts, is_query=True, prefer=prefer))
            asked = self._asked[key] = _Asked(answer)
        asked.waiting += 1
        try:
            return await asyncio.shield(asked.answer)
        finally:
            asked.waiting -= 1
            if not asked.waiting:
                asked.answer.cancel()
            if self._asked.get(key) is asked and (asked.answer.done() or not asked.waiting):
                del self._asked[key]
