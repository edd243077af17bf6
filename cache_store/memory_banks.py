"""Banks in dicts: for tests, and for one front end without Redis. Gone when it stops."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from cache_store.bank_store import BankPage, Changes, Committed, Seen
from cache_store.banks import (
    DEFAULT_MAX_ENTRIES,
    BankRecord,
    Entry,
    Kept,
    Supersession,
    Use,
    Vector,
    check_bank_name,
    plain_name,
)
from cache_store.errors import BankExists, BankFull, BankNotFound, EmbedderChanged, EntriesMissing

_NEVER = Use(0, 0)


@dataclass(slots=True)
class _Document:
    digest: str
    ids: list[str]


@dataclass(slots=True)
class _Bank:
    record: BankRecord
    entries: dict[str, Entry] = field(default_factory=dict)
    vectors: dict[str, Vector] = field(default_factory=dict)
    staged: dict[str, Kept] = field(default_factory=dict)
    documents: dict[str, _Document] = field(default_factory=dict)
    uses: dict[str, Use] = field(default_factory=dict)
    superseded: dict[str, str] = field(default_factory=dict)
    changed: dict[int, str] = field(default_factory=dict)
    """The entry that each version changed last, where no later one did."""
    versions: dict[str, int] = field(default_factory=dict)
    """The other way round."""
    next_embedder: str = ""
    next_vectors: dict[str, Vector] = field(default_factory=dict)

    def touch(self, entry_id: str) -> None:
        self.changed.pop(self.versions.get(entry_id, 0), None)
        version = self.record.version + 1
        self.record = replace(self.record, version=version)
        self.changed[version] = entry_id
        self.versions[entry_id] = version

    def counted(self) -> BankRecord:
        return replace(self.record, entries=len(self.entries), documents=len(self.documents))

    def read(self, entry_id: str) -> Entry:
        recalls, last_ms = self.uses.get(entry_id, _NEVER)
        superseded_by = self.superseded.get(entry_id, "")
        return replace(self.entries[entry_id], recalls=recalls, last_recalled_ms=last_ms, superseded_by=superseded_by)

    def drop(self, entry_id: str) -> None:
        heir = self.superseded.pop(entry_id, "")
        for loser in [loser for loser, winner in self.superseded.items() if winner == entry_id]:
            if heir:
                self.superseded[loser] = heir
            else:
                del self.superseded[loser]
            self.touch(loser)
        del self.entries[entry_id]
        for of_entry in (self.vectors, self.next_vectors, self.uses):
            of_entry.pop(entry_id, None)
        self.touch(entry_id)


class MemoryBanks:
    """A `BankStore`."""

    def __init__(self) -> None:
        self._banks: dict[tuple[str, str], _Bank] = {}

    def name_of(self, tenant: str, bank: str, *parts: str) -> str:
        return plain_name(tenant, bank, *parts)

    async def create(self, record: BankRecord) -> BankRecord:
        key = (record.tenant, record.name)
        if key in self._banks:
            raise BankExists(f"bank {record.name} exists")
        record = replace(record, incarnation=uuid.uuid4().hex)
        self._banks[key] = _Bank(record)
        return record

    async def get(self, tenant: str, name: str) -> BankRecord:
        return self._find(tenant, name).counted()

    async def page(self, tenant: str, *, page_size: int, page_token: str) -> BankPage:
        if page_token:
            check_bank_name(page_token, "page_token")
        names = sorted(name for owner, name in self._banks if owner == tenant and name > page_token)
        records = [self._banks[tenant, name].counted() for name in names[:page_size]]
        return BankPage(records, names[page_size - 1] if len(names) > page_size else "")

    async def delete(self, tenant: str, name: str) -> int:
        entries = self._find(tenant, name).entries
        del self._banks[tenant, name]
        return len(entries)

    async def erase(self, tenant: str) -> int:
        names = [name for owner, name in self._banks if owner == tenant]
        return sum([await self.delete(tenant, name) for name in names])

    async def add(
        self,
        bank: BankRecord,
        kept: Sequence[Kept],
        *,
        embedder: str,
        supersedes: Sequence[Supersession] = (),
        stands: str = "",
        max_entries: int = DEFAULT_MAX_ENTRIES,
    ) -> list[bool]:
        here = self._writable(bank, kept, embedder)
        new_ids = {entry.id for entry, _ in kept if entry.id not in here.entries}
        named = {entry_id for pair in supersedes for entry_id in pair}
        if missing := tuple(sorted(named - new_ids - here.entries.keys())):
            raise EntriesMissing(missing)
        _check_room(here, new_ids, max_entries)
        is_new = []
        for entry, vector in kept:
            is_new.append(entry.id not in here.entries)
            if is_new[-1]:
                here.entries[entry.id], here.vectors[entry.id] = entry, vector
                here.touch(entry.id)
        for loser, winner in supersedes:
            if here.superseded.get(loser) != winner:
                here.superseded[loser] = winner
                here.touch(loser)
        if here.superseded.pop(stands, ""):
            here.touch(stands)
        return is_new

    async def stage(self, bank: BankRecord, kept: Sequence[Kept], *, embedder: str, max_entries: int) -> None:
        here = self._writable(bank, kept, embedder)
        _check_room(here, {entry.id for entry, _ in kept if entry.id not in here.entries}, max_entries)
        here.staged |= {entry.id: Kept(entry, vector) for entry, vector in kept if entry.id not in here.entries}

    async def commit_document(self, bank: BankRecord, document_id: str, digest: str, ids: Sequence[str]) -> Committed:
        here = self._same(bank)
        if missing := [chunk for chunk in ids if chunk not in here.entries and chunk not in here.staged]:
            return Committed(0, missing)
        before = here.documents.get(document_id)
        new = [chunk for chunk in dict.fromkeys(ids) if chunk not in here.entries]
        for chunk in new:
            here.entries[chunk], here.vectors[chunk] = here.staged.pop(chunk)
            here.touch(chunk)
        for chunk in set(before.ids if before else ()) - set(ids):
            if chunk in here.entries:
                here.drop(chunk)
        here.documents[document_id] = _Document(digest, list(ids))
        return Committed(len(new), [])

    async def has_document(self, bank: BankRecord, document_id: str, digest: str) -> bool:
        here = self._same(bank)
        document = here.documents.get(document_id)
        return document is not None and document.digest == digest and here.entries.keys() >= set(document.ids)

    async def changes(self, tenant: str, name: str, seen: Seen, *, most: int) -> Changes:
        here = self._find(tenant, name)
        record = here.counted()
        from_nothing = (seen.incarnation, seen.embedder) != (record.incarnation, record.embedder)
        if from_nothing:
            seen = Seen(record.incarnation, record.embedder, 0, record.version)
        kept: list[Kept] = []
        gone: list[str] = []
        version = seen.version
        while version < record.version and len(kept) + len(gone) < most:
            version += 1
            entry_id = here.changed.get(version)
            if entry_id in here.entries:
                kept.append(Kept(here.read(entry_id), here.vectors[entry_id]))
            elif entry_id is not None:
                gone.append(entry_id)
        is_last = version == record.version
        seen = seen._replace(version=version, begun_at=version if is_last else seen.begun_at)
        return Changes(record, seen, from_nothing, kept, gone, is_last)

    async def entries(self, bank: BankRecord, ids: Sequence[str]) -> list[Entry | None]:
        here = self._same(bank)
        return [here.read(entry_id) if entry_id in here.entries else None for entry_id in ids]

    async def vectors(self, bank: BankRecord, ids: Sequence[str]) -> list[Vector | None]:
        here = self._same(bank)
        here.counted().check_embedder(bank.embedder)
        return [here.vectors.get(entry_id) for entry_id in ids]

    async def near(self, bank: BankRecord, vector: Vector, most: int) -> list[str]:
        vectors = self._same(bank).vectors
        return sorted(vectors, key=lambda entry_id: -float(vectors[entry_id] @ vector))[:most]

    async def uses(self, bank: BankRecord, ids: Sequence[str]) -> list[Use]:
        here = self._same(bank)
        return [here.uses.get(entry_id, _NEVER) for entry_id in ids]

    async def add_uses(self, bank: BankRecord, uses: Mapping[str, Use]) -> None:
        here = self._same(bank)
        for entry_id, more in uses.items():
            if entry_id in here.entries:
                before = here.uses.get(entry_id, _NEVER)
                here.uses[entry_id] = Use(before.recalls + more.recalls, max(before.last_ms, more.last_ms))

    async def remove(self, bank: BankRecord, entries: Sequence[Entry], *, unused_since_ms: int = 0) -> list[str]:
        here = self._same(bank)
        going = [
            entry.id
            for entry in entries
            if entry.id in here.entries
            and not (unused_since_ms and here.uses.get(entry.id, _NEVER).last_ms >= unused_since_ms)
        ]
        for entry_id in going:
            here.drop(entry_id)
        for document_id in {entry.document_id for entry in entries if entry.document_id}:
            document = here.documents.get(document_id)
            if document is not None and here.entries.keys().isdisjoint(document.ids):
                del here.documents[document_id]
        return going

    async def begin_reembed(self, bank: BankRecord, embedder: str) -> None:
        here = self._same(bank)
        if here.next_embedder != embedder:
            here.next_embedder, here.next_vectors = embedder, {}

    async def put_vectors(self, bank: BankRecord, embedder: str, vectors: Mapping[str, Vector]) -> None:
        here = self._same(bank)
        if here.next_embedder != embedder:
            raise EmbedderChanged(bank.name, here.next_embedder, embedder)
        here.next_vectors |= {entry_id: vector for entry_id, vector in vectors.items() if entry_id in here.entries}

    async def finish_reembed(self, bank: BankRecord, embedder: str, dim: int, *, at_version: int) -> bool:
        here = self._same(bank)
        if here.next_embedder != embedder:
            raise EmbedderChanged(bank.name, here.next_embedder, embedder)
        if here.record.version != at_version:
            return False
        here.vectors, here.next_vectors, here.next_embedder = here.next_vectors, {}, ""
        here.record = replace(here.record, embedder=embedder, embedding_dim=dim)
        return True

    async def available(self) -> bool:
        return True

    async def aclose(self) -> None:
        self._banks.clear()

    def _find(self, tenant: str, name: str) -> _Bank:
        here = self._banks.get((tenant, name))
        if here is None:
            raise BankNotFound(f"there is no bank {name}")
        return here

    def _same(self, bank: BankRecord) -> _Bank:
        here = self._find(bank.tenant, bank.name)
        if here.record.incarnation != bank.incarnation:
            raise BankNotFound(f"bank {bank.name} was deleted; there is another one of that name")
        return here

    def _writable(self, bank: BankRecord, kept: Sequence[Kept], embedder: str) -> _Bank:
        here = self._same(bank)
        if kept and not here.entries and not here.staged:
            here.record = replace(here.record, embedder=embedder, embedding_dim=len(kept[0].vector))
        if kept and here.record.embedder != embedder:
            raise EmbedderChanged(bank.name, here.record.embedder, embedder)
        return here


def _check_room(here: _Bank, new_ids: set[str], max_entries: int) -> None:
    if new_ids and len(here.entries) + len(here.staged.keys() - new_ids) + len(new_ids) > max_entries:
        raise BankFull("max_bank_entries", max_entries)
