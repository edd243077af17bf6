"""What can be done with banks: the one door to them. Knows no gRPC, and not where banks are kept or vectors made."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

from cache_store.bank_store import BankPage, BankStore
from cache_store.banks import (
    DEFAULT_MAX_ENTRIES,
    BankRecord,
    BankSettings,
    Entry,
    EntryFilter,
    EntryKind,
    Kept,
    Supersession,
    Vector,
    check_bank_name,
)
from cache_store.errors import BankNotFound, EntriesMissing, InvalidRequest
from server.banks import checks, documents, reembedding, transfer
from server.banks.documents import Document, DocumentDone
from server.banks.embeds import Embeds
from server.banks.entries import entry_id, vectors_of
from server.banks.index import Ranked
from server.banks.indexes import Indexes, in_thread
from server.banks.prefills import Prefills
from server.banks.transfer import Imported
from server.banks.uses import Uses
from server.banks.vectors import EXACT_ROWS

__all__ = ["BankKeeper", "Document", "DocumentDone", "Imported", "Recalled"]

DEFAULT_MAX_INDEX_BYTES: Final = 2 << 30
_MAX_DESCRIPTION_BYTES: Final = 4096
_MAX_SUPERSEDED: Final = 100
_REMOVED_AT_ONCE: Final = 256
EVERYTHING: Final = EntryFilter()


class Recalled(NamedTuple):
    """An entry, and what its score is made of: see `server.banks.scoring`."""

    entry: Entry
    """As it was before this recall."""
    score: float
    cosine: float
    bm25: float
    relevance: float
    retention: float


class _Asked(NamedTuple):
    text: str
    embedder: str
    vector: Vector
    k: int
    where: EntryFilter
    with_superseded: bool


class BankKeeper:
    """Every call may raise BankNotFound, StoreUnavailable and what else its store raises; those that need vectors
    NoWorker and EmbedderChanged; and InvalidRequest for what no bank takes."""

    def __init__(
        self,
        store: BankStore,
        embedding: Embeds,
        *,
        max_entries: int = DEFAULT_MAX_ENTRIES,
        max_index_bytes: int = DEFAULT_MAX_INDEX_BYTES,
        exact_rows: int = EXACT_ROWS,
        now: Callable[[], float] = time.time,
        prefills: Prefills | None = None,
    ) -> None:
        """A bank has at most `max_entries`; what is searched is kept in memory, up to `max_index_bytes`, and compared
        one by one up to `exact_rows`."""
        self._store = store
        self._embedding = embedding
        self._max_entries = max_entries
        self._indexes = Indexes(store, max_bytes=max_index_bytes, exact_rows=exact_rows)
        self._uses = Uses(store)
        self._now = now
        self._prefills = prefills

    async def create(self, tenant: str, name: str, *, description: str = "", settings: BankSettings) -> BankRecord:
        """Raises BankExists."""
        if len(description.encode()) > _MAX_DESCRIPTION_BYTES:
            raise InvalidRequest("description", f"must have at most {_MAX_DESCRIPTION_BYTES:,} bytes of UTF-8")
        record = BankRecord(
            tenant=tenant,
            name=check_bank_name(name),
            description=description,
            created_ms=self._now_ms(),
            settings=settings,
        )
        return await self._store.create(record)

    async def get(self, tenant: str, name: str) -> BankRecord:
        try:
            return await self._store.get(tenant, check_bank_name(name))
        except BankNotFound:  # another front end has deleted it: nothing of it stays here
            self._indexes.drop(tenant, name)
            raise

    async def page(self, tenant: str, *, page_size: int, page_token: str) -> BankPage:
        return await self._store.page(tenant, page_size=page_size, page_token=page_token)

    async def delete(self, tenant: str, name: str) -> int:
        """Delete a bank; say how many entries it had."""
        entries = await self._store.delete(tenant, check_bank_name(name))
        self._indexes.drop(tenant, name)
        return entries

    async def erase(self, tenant: str) -> int:
        """Delete all banks of a tenant; say how many entries they had."""
        entries = await self._store.erase(tenant)
        self._indexes.drop_tenant(tenant)
        return entries

    async def remember(
        self,
        tenant: str,
        name: str,
        *,
        text: str,
        metadata: Mapping[str, str],
        importance: float = 0.5,
        supersedes: Sequence[str] = (),
        kind: EntryKind = EntryKind.FACT,
        session_id: str = "",
        turn: int = 0,
    ) -> Entry:
        """Add an entry. One that is there is returned as it is, and needs no worker; what it supersedes loses to it
        from now on all the same, and it stands again if it had lost itself."""
        checks.check_text(text)
        checks.check_importance(importance)
        bank = await self.get(tenant, name)
        new = Entry(
            id="",
            text=text,
            kind=kind,
            metadata=checks.check_metadata(metadata),
            importance=importance,
            created_ms=self._now_ms(),
            session_id=session_id,
            turn=turn,
        )
        new = replace(new, id=entry_id(self._store, bank, new))
        _check_supersedes(supersedes, new.id)
        [entry] = await self._store.entries(bank, [new.id])
        if entry is not None and not supersedes:
            return entry
        kept, embedder = [], ""
        if entry is None:
            embedder, [vector] = await vectors_of(self._embedding, bank, [text], ["text"])
            kept = [Kept(new, vector)]
        pairs = [Supersession(loser, new.id) for loser in supersedes]
        try:
            await self._store.add(
                bank, kept, embedder=embedder, supersedes=pairs, stands=new.id, max_entries=self._max_entries
            )
        except EntriesMissing as error:
            raise InvalidRequest("supersedes", str(error)) from error
        await self._expire(bank)
        if entry is None and self._prefills is not None:
            await self._prefills.prefill(bank, [new])
        return replace(entry or new, superseded_by="")

    async def recall(
        self,
        tenant: str,
        name: str,
        query: str,
        *,
        k: int = 8,
        where: EntryFilter = EVERYTHING,
        with_superseded: bool = False,
        peek: bool = False,
    ) -> list[Recalled]:
        """The entries that matter most to the query, the best first; they are stronger from then on, unless it is only
        a `peek`."""
        checks.check_text(query, "query")
        checks.check_k(k)
        bank = await self.get(tenant, name)
        embedder, [vector] = await vectors_of(self._embedding, bank, [query], ["query"], is_query=True)
        asked = _Asked(query, embedder, vector, k, where, with_superseded)
        await self._expire(bank)
        for last_try in (False, False, False, True):
            bank, ranked = await self._ranked(bank, asked)
            entries = await self._store.entries(bank, [one.id for one in ranked])
            if None not in entries or last_try:  # else a document was replaced meanwhile: neither is seen without this
                break
        recalled = [
            Recalled(replace(entry, recalls=one.use.recalls, last_recalled_ms=one.use.last_ms), *one.made_of)
            for one, entry in zip(ranked, entries, strict=True)
            if entry is not None and (with_superseded or not entry.superseded_by)  # it may just have lost
        ]
        if not peek:
            self._uses.add(bank, [entry.id for entry, *_ in recalled], self._now_ms())
        return recalled

    def count_recalls(self, bank: BankRecord, ids: Sequence[str]) -> None:
        """What was peeked at has been used: these entries are stronger from now on."""
        self._uses.add(bank, ids, self._now_ms())

    async def _ranked(self, bank: BankRecord, asked: _Asked) -> tuple[BankRecord, list[Ranked]]:
        """The bank as it is now, and what is best in it."""
        text, embedder, vector, k, where, with_superseded = asked
        async with self._indexes.current(bank.tenant, bank.name) as (bank, index):
            bank.check_embedder(embedder)
            if not len(index):
                return bank, []
            near = None
            if bank.has_vector_set and (most := index.num_candidates(where, k=k, with_superseded=with_superseded)):
                near = await self._store.near(bank, vector, most)
            found = await in_thread(
                lambda: index.search(text, vector, where, k=k, with_superseded=with_superseded, near=near)
            )
            uses = await self._uses.read(bank, found.ids)
            index.set_uses(dict(zip(found.ids, uses, strict=True)))
            return bank, index.ranked(bank, found, uses, k=k, now_ms=self._now_ms())

    async def forget(
        self, tenant: str, name: str, *, ids: Sequence[str] = (), where: EntryFilter = EVERYTHING, unused_for_s: int = 0
    ) -> int:
        """Delete entries for good: those that are named, those that pass the filter, and those that were neither
        recalled nor created for so long. Returns how many."""
        if not ids and where.is_empty and not unused_for_s:
            raise InvalidRequest("ids", "one of ids, filter and unused_for_s must be set")
        bank = await self.get(tenant, name)
        named = list(dict.fromkeys(ids))
        if not where.is_empty:
            async with self._indexes.current(tenant, name) as (bank, index):
                named = list(dict.fromkeys([*named, *index.matching(where)]))
        removed = await self._remove(bank, named)
        if unused_for_s:
            removed += await self._remove_unused(bank, self._now_ms() - 1000 * unused_for_s, most=None)
        return removed

    def put_documents(self, tenant: str, name: str, to_put: Sequence[Document]) -> AsyncGenerator[DocumentDone, None]:
        """Cut documents in chunks and keep these, one document after the other: see `server.banks.documents`."""
        return documents.put(
            self._store,
            self._embedding,
            tenant,
            name,
            to_put,
            max_entries=self._max_entries,
            now=self._now,
            prefills=self._prefills,
        )

    def export(self, tenant: str, name: str, *, with_vectors: bool) -> AsyncGenerator[bytes, None]:
        """All entries as whole lines of JSON, the oldest first: see `server.banks.transfer`."""
        return transfer.export(self._store, self._indexes, tenant, name, with_vectors=with_vectors)

    async def import_lines(self, tenant: str, name: str, chunks: AsyncIterator[bytes]) -> Imported:
        """Add entries of lines as `export` gives them, however they are cut. What is there is left alone."""
        return await transfer.import_lines(
            self._store, self._embedding, tenant, name, chunks, max_entries=self._max_entries, now=self._now
        )

    def reembed(self, tenant: str, name: str) -> AsyncGenerator[tuple[int, int], None]:
        """Make all vectors anew with the embedding model that the workers have now; until its end the bank has those
        that it had. Says how many of how many are done."""
        return reembedding.reembed(self._store, self._embedding, tenant, name)

    async def aclose(self) -> None:
        """Write what waits to be written. The store is not closed."""
        await self._indexes.aclose()
        await self._uses.aclose()

    async def _expire(self, bank: BankRecord) -> None:
        """Apply the bank's `delete_after_s`, to a bounded number of entries: who writes to a bank or recalls from it
        does this, and what nobody reads may stay."""
        if bank.settings.delete_after_s:
            since_ms = self._now_ms() - 1000 * bank.settings.delete_after_s
            await self._remove_unused(bank, since_ms, most=_REMOVED_AT_ONCE)

    async def _remove_unused(self, bank: BankRecord, since_ms: int, *, most: int | None) -> int:
        """Uses that other front ends have seen are asked for: this one's index need not know them."""
        async with self._indexes.current(bank.tenant, bank.name) as (bank, index):
            ids = index.matching(EVERYTHING, unused_since_ms=since_ms)[:most]
            if ids:
                index.set_uses(dict(zip(ids, await self._uses.read(bank, ids), strict=True)))
                ids = index.matching(EVERYTHING, unused_since_ms=since_ms)[:most]
        return await self._remove(bank, ids, unused_since_ms=since_ms)

    async def _remove(self, bank: BankRecord, ids: Sequence[str], *, unused_since_ms: int = 0) -> int:
        removed = 0
        for start in range(0, len(ids), _REMOVED_AT_ONCE):
            entries = await self._store.entries(bank, ids[start : start + _REMOVED_AT_ONCE])
            there = [entry for entry in entries if entry is not None]
            if there:
                gone = set(await self._store.remove(bank, there, unused_since_ms=unused_since_ms))
                removed += len(gone)
                if self._prefills is not None:
                    await self._prefills.forget(bank, [entry for entry in there if entry.id in gone])
        return removed

    def _now_ms(self) -> int:
        return int(self._now() * 1000)


def _check_supersedes(supersedes: Sequence[str], entry_id: str) -> None:
    if len(supersedes) > _MAX_SUPERSEDED:
        raise InvalidRequest("supersedes", f"at most {_MAX_SUPERSEDED} are possible, got {len(supersedes)}")
    if entry_id in supersedes:
        raise InvalidRequest("supersedes", "an entry can't supersede itself")
