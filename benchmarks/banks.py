"""A large bank in a real Redis: how long until a front end has read it, and how long it then searches.

Entries have random vectors and random words of a natural frequency; nothing is embedded. One front end puts them, by
the calls that `Remember` and imports use; another one opens the bank, and is asked before, while and after it changes.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import redis
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from benchmarks.harness import finish
from cache_store.bank_store import BankStore
from cache_store.banks import BankRecord, BankSettings, Entry, EntryKind, Kept, Vector
from cache_store.embedded_redis import RedisServer
from cache_store.open_banks import open_banks
from server.banks.keeper import BankKeeper
from server.embedding import Chunk, Embedded

_TENANT: Final = "bench"
_BANK: Final = "large"
_EMBEDDER: Final = "random"
_DIM: Final = 384
_VOCABULARY: Final = 30_000
_EXPONENT: Final = 1.2
"""Of Zipf's law, by which words are drawn."""
_AT_ONCE: Final = 128
_TIMEOUT_S: Final = 30.0
_CHANGES: Final = 20
_MIB: Final = 1 << 20


def run(*, entries: int = 100_000, words: int = 25, queries: int = 100, as_json: bool = False) -> int:
    """Measure; there are no bars, and it returns 0. 1,000,000 entries take some ten minutes and 6 GB.

    Args:
        entries: Of the bank.
        words: Of an entry's text.
        queries: Each of two words.
        as_json: Print one JSON object.
    """
    with RedisServer() as server:
        figures = asyncio.run(_measured(server, _Texts(words), entries, queries, quiet=as_json))
    return finish("banks", figures, [], as_json=as_json)


class _Texts:
    """Random ones, each with a random vector. It embeds as `server.banks.embeds.Embeds` asks."""

    def __init__(self, words: int) -> None:
        self._words = words
        self._random = np.random.default_rng(0)
        shares = 1 / np.arange(1, _VOCABULARY + 1) ** _EXPONENT
        self._up_to = np.cumsum(shares) / shares.sum()

    def text(self, words: int) -> str:
        drawn = np.searchsorted(self._up_to, self._random.random(words))
        return " ".join(f"w{number}" for number in drawn.tolist())

    def vectors(self, count: int) -> NDArray[np.float32]:
        """[count, dim], of unit length."""
        drawn = self._random.standard_normal((count, _DIM), dtype=np.float32)
        drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        return drawn

    def kept(self, first: int, count: int) -> list[Kept]:
        vectors: Sequence[Vector] = list(self.vectors(count))
        return [
            Kept(
                Entry(id=f"{first + number:032x}", text=self.text(self._words), kind=EntryKind.FACT, created_ms=first),
                vector,
            )
            for number, vector in enumerate(vectors)
        ]

    async def embed(
        self,
        texts: Sequence[str],
        *,
        chunk_tokens: int = 0,
        overlap_tokens: int = 0,
        is_query: bool = False,
        prefer: str = "",
    ) -> Embedded:
        vectors = self.vectors(len(texts))
        return Embedded(_EMBEDDER, _DIM, [[Chunk(0, 1, 1, vector)] for vector in vectors])


async def _measured(server: RedisServer, texts: _Texts, entries: int, queries: int, *, quiet: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {"entries": entries}
    writer, reader = (open_banks(server.url, timeout_s=_TIMEOUT_S) for _ in range(2))
    keeper = BankKeeper(reader, texts, max_entries=entries + _CHANGES)
    try:
        bank = await keeper.create(_TENANT, _BANK, settings=BankSettings())
        began_s = time.perf_counter()
        await _put(writer, bank, texts, entries, quiet=quiet)
        figures["put_ms_each"] = 1000 * (time.perf_counter() - began_s) / entries
        figures["redis_mib"] = _redis_bytes(server) / _MIB
        before_bytes, began_s = _resident_bytes(), time.perf_counter()
        await keeper.recall(_TENANT, _BANK, texts.text(2), peek=True)
        figures["first_search_s"] = time.perf_counter() - began_s
        figures["front_end_mib"] = (_resident_bytes() - before_bytes) / _MIB
        figures |= await _latencies("search", queries, lambda _: _recall(keeper, texts))
        figures |= await _latencies("after_write", _CHANGES, lambda number: _recall(keeper, texts, after=number + 1))
    finally:
        await keeper.aclose()
        await reader.aclose()
        await writer.aclose()
    return figures


async def _put(store: BankStore, bank: BankRecord, texts: _Texts, entries: int, *, quiet: bool) -> None:
    with Progress(console=Console(stderr=True), disable=quiet, transient=True) as progress:
        task = progress.add_task("putting", total=entries)
        for first in range(0, entries, _AT_ONCE):
            kept = texts.kept(first, min(_AT_ONCE, entries - first))
            await store.add(bank, kept, embedder=_EMBEDDER, max_entries=entries)
            progress.advance(task, len(kept))


async def _recall(keeper: BankKeeper, texts: _Texts, *, after: int = 0) -> float:
    """Seconds that a search takes; with `after`, of a bank that has just changed."""
    if after:
        await keeper.remember(_TENANT, _BANK, text=f"{after} {texts.text(5)}", metadata={})
    query, began_s = texts.text(2), time.perf_counter()
    await keeper.recall(_TENANT, _BANK, query, peek=True)
    return time.perf_counter() - began_s


async def _latencies(name: str, count: int, ask: Callable[[int], Any]) -> dict[str, float]:
    taken_ms = [1000 * await ask(number) for number in range(count)]
    return {f"{name}_p{share}_ms": float(np.percentile(taken_ms, share)) for share in (50, 99)}


def _redis_bytes(server: RedisServer) -> int:
    with redis.Redis.from_url(server.url) as client:
        info: Any = client.info("memory")
        return int(info["used_memory"])


def _resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])
