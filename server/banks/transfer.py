"""Banks out and in as lines of JSON, one entry each. What a line has, is `lines`' to say."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Final, NamedTuple

from cache_store.bank_store import BankStore
from cache_store.banks import BankRecord, EntryFilter, Kept, Supersession, Use, Vector, check_bank_name
from cache_store.errors import EmbedderChanged, EntriesMissing, InvalidRequest, StoreUnavailable
from server.banks import checks
from server.banks.embeds import Embeds
from server.banks.entries import entry_id, vectors_of
from server.banks.indexes import Indexes
from server.banks.lines import Line, read_line, whole_lines, write_line

_AT_ONCE: Final = 128


class Imported(NamedTuple):
    entries: int
    """Lines that were read."""
    new_entries: int


async def export(
    store: BankStore, indexes: Indexes, tenant: str, name: str, *, with_vectors: bool
) -> AsyncGenerator[bytes, None]:
    """The entries that there are when it begins, but for those that go meanwhile; the oldest first.

    Raises EmbedderChanged where vectors are asked for and all are made anew meanwhile.
    """
    async with indexes.current(tenant, check_bank_name(name)) as (bank, index):
        ids = index.matching(EntryFilter())
    for start in range(0, len(ids), _AT_ONCE):
        batch = ids[start : start + _AT_ONCE]
        entries = await store.entries(bank, batch)
        vectors: Sequence[Vector | None] = [None] * len(batch)
        if with_vectors:
            vectors = await store.vectors(bank, batch)
        lines = [
            write_line(entry, bank.embedder, vector)
            for entry, vector in zip(entries, vectors, strict=True)
            if entry is not None
        ]
        if lines:
            yield b"".join(lines)


async def import_lines(
    store: BankStore,
    embedding: Embeds,
    tenant: str,
    name: str,
    chunks: AsyncIterator[bytes],
    *,
    max_entries: int,
    now: Callable[[], float],
) -> Imported:
    """Raises InvalidRequest naming the line (from 0). Lines before it are in the bank then, but for documents."""
    bank = await store.get(tenant, check_bank_name(name))
    importing = _Import(store, embedding, bank, max_entries, int(now() * 1000))
    async for lines in _batches(whole_lines(chunks), importing.now_ms):
        await importing.take(lines)
    return await importing.finish()


async def _batches(lines: AsyncIterator[bytes], now_ms: int) -> AsyncGenerator[list[Line], None]:
    batch, number = [], 0
    async for line in lines:
        if line.strip():
            batch.append(read_line(line, number, now_ms=now_ms))
        number += 1
        if len(batch) == _AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


class _Import:
    def __init__(self, store: BankStore, embedding: Embeds, bank: BankRecord, max_entries: int, now_ms: int) -> None:
        self._store, self._embedding, self._bank, self._max_entries = store, embedding, bank, max_entries
        self.now_ms = now_ms
        self._embedder, self._dim = (bank.embedder, bank.embedding_dim) if bank.entries else ("", 0)
        self._documents: dict[tuple[str, str], list[tuple[int, str]]] = {}
        """Chunks (number, id) by document and its content: they come in sight at the end."""
        self._uses: dict[str, Use] = {}
        """Of chunks that are not in sight yet."""
        self._ids: dict[str, str] = {}
        """In this bank, by those that the lines have."""
        self._winners: dict[str, str] = {}
        """By who loses, both as the lines call them."""
        self._entries = self._new = 0

    async def take(self, lines: Sequence[Line]) -> None:
        named = [self._named(line) for line in lines]
        there = await self._store.entries(self._bank, [line.entry.id for line in named])
        new = {line.entry.id: line for line, entry in zip(named, there, strict=True) if entry is None}
        kept = await self._with_vectors(list(new.values()))
        chunks = [one for one in kept if new[one.entry.id].is_chunk]
        others = [one for one in kept if not new[one.entry.id].is_chunk]
        if chunks:
            await self._store.stage(self._bank, chunks, embedder=self._embedder, max_entries=self._max_entries)
            self._uses |= _uses_of(new[one.entry.id] for one in chunks)
        if others:
            added = await self._store.add(self._bank, others, embedder=self._embedder, max_entries=self._max_entries)
            self._new += sum(added)
            were_new = [new[one.entry.id] for one, is_new in zip(others, added, strict=True) if is_new]
            if uses := _uses_of(were_new):
                await self._store.add_uses(self._bank, uses)

    def _named(self, line: Line) -> Line:
        """Under the id that it has in this bank; remember what is to be done at the end."""
        its, entry = line.entry, replace(line.entry, id=entry_id(self._store, self._bank, line.entry), superseded_by="")
        if its.id:
            self._ids[its.id] = entry.id
            if its.superseded_by:
                self._winners[its.id] = its.superseded_by
        if line.is_chunk:
            self._documents.setdefault((entry.document_id, entry.document_digest), []).append((entry.chunk, entry.id))
        self._entries += 1
        return replace(line, entry=entry)

    async def finish(self) -> Imported:
        for (document_id, digest), chunks in self._documents.items():
            checks.check_chunks(len(chunks), f"lines: document {document_id}")
            ids = [chunk_id for _, chunk_id in sorted(chunks)]
            new_entries, missing = await self._store.commit_document(self._bank, document_id, digest, ids)
            if missing:
                raise StoreUnavailable(f"chunks of document {document_id} were deleted during the import")
            self._new += new_entries
        for names in _batched(self._uses):
            await self._store.add_uses(self._bank, {name: self._uses[name] for name in names})
        for loser in _deepest_first(self._winners):
            if loser in self._ids and self._winners[loser] in self._ids:
                await self._supersede(self._ids[loser], self._ids[self._winners[loser]])
        return Imported(self._entries, self._new)

    async def _with_vectors(self, lines: Sequence[Line]) -> list[Kept]:
        """A line's own vector where it is of the embedder that the bank has or gets, else a new one."""
        if lines and not self._embedder:
            self._embedder, [vector] = await self._embed(lines[:1])
            self._dim = len(vector)
        lacking = [line for line in lines if line.embedder != self._embedder or line.vector is None]
        for line in lines:
            if line.embedder == self._embedder and line.vector is not None and len(line.vector) != self._dim:
                raise InvalidRequest(f"lines[{line.number}].vector", f"must have {self._dim} numbers")
        made: dict[str, Vector] = {}
        if lacking:
            embedder, vectors = await self._embed(lacking)
            if embedder != self._embedder:
                raise EmbedderChanged(self._bank.name, self._embedder, embedder)
            made = {line.entry.id: vector for line, vector in zip(lacking, vectors, strict=True)}
        made |= {line.entry.id: line.vector for line in lines if line.entry.id not in made and line.vector is not None}
        return [Kept(line.entry, made[line.entry.id]) for line in lines]

    async def _embed(self, lines: Sequence[Line]) -> tuple[str, list[Vector]]:
        fields = [f"lines[{line.number}].text" for line in lines]
        return await vectors_of(self._embedding, self._bank, [line.entry.text for line in lines], fields)

    async def _supersede(self, loser: str, winner: str) -> None:
        """Unless the loser has lost already, or the winner has lost to it here."""
        [entry] = await self._store.entries(self._bank, [loser])
        above = winner
        while entry is not None and above and above != loser:
            [higher] = await self._store.entries(self._bank, [above])
            above = higher.superseded_by if higher is not None else ""
        if entry is None or entry.superseded_by or above == loser:
            return
        try:
            pairs = [Supersession(loser, winner)]
            await self._store.add(self._bank, [], embedder=self._embedder, supersedes=pairs)
        except EntriesMissing:
            return  # forgotten in this moment


def _batched(names: Iterable[str]) -> Iterable[list[str]]:
    left = iter(names)
    while batch := list(islice(left, _AT_ONCE)):
        yield batch


def _uses_of(lines: Iterable[Line]) -> dict[str, Use]:
    """What the lines say, where that is not nothing."""
    return {line.entry.id: Use(line.entry.recalls, line.entry.last_recalled_ms) for line in lines if line.entry.recalls}


def _deepest_first(winners: Mapping[str, str]) -> list[str]:
    """Who loses, so that nobody comes before who lost to him. Raises InvalidRequest where they lose in a circle."""
    depths: dict[str, int] = {}
    for loser in winners:
        chain = [loser]
        while (above := winners.get(chain[-1], "")) and above not in depths:
            if above in chain:
                raise InvalidRequest("lines", f"entries supersede each other in a circle, {above} among them")
            chain.append(above)
        depth = depths.get(above, 0)
        for one in reversed(chain):
            depth += 1
            depths[one] = depth
    return sorted(winners, key=lambda loser: -depths[loser])
