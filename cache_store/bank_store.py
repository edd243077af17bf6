"""What the front end asks of the place that keeps banks. No Redis here.

A bank counts its changes. Who has seen all up to one of them asks for those that came after it, and has then the same
bank as the store: that is how front ends keep in memory what they search. How often an entry was recalled is no change.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from cache_store.banks import DEFAULT_MAX_ENTRIES, BankRecord, Entry, Kept, Supersession, Use, Vector


class BankPage(NamedTuple):
    records: list[BankRecord]
    """By name."""
    next_token: str
    """Empty on the last page."""


class Seen(NamedTuple):
    """How far a reader has read a bank."""

    incarnation: str = ""
    embedder: str = ""
    version: int = 0
    """It has read the changes up to this one."""
    begun_at: int = 0
    """The bank's version when it began to read them, or when it had last read all."""


class Changes(NamedTuple):
    bank: BankRecord
    seen: Seen
    """To ask for what follows."""
    from_nothing: bool
    """What was read before is no good: it was another bank, its vectors were others, or what has gone since then is no
    longer known."""
    kept: list[Kept]
    gone: list[str]
    is_last: bool
    """The reader now has what the bank had a moment ago."""


class Committed(NamedTuple):
    new_entries: int
    missing: list[str]
    """Chunks that are not there, or no longer: nothing was changed."""


class BankStore(Protocol):
    """Banks by tenant and name. Every call may raise StoreUnavailable, those that write StoreFull, and those that read
    RecordUnreadable: what is kept was changed, or there is no key for it.

    A call that is given a `bank` raises BankNotFound where that one is gone, whatever is there under its name now.
    """

    def name_of(self, tenant: str, bank: str, *parts: str) -> str:
        """A name for these parts: 32 hex digits, always the same. Where values are sealed nobody can tell what of."""
        ...

    async def create(self, record: BankRecord) -> BankRecord:
        """Returns it with its incarnation. Raises BankExists."""
        ...

    async def get(self, tenant: str, name: str) -> BankRecord:
        """Raises BankNotFound."""
        ...

    async def page(self, tenant: str, *, page_size: int, page_token: str) -> BankPage:
        """Raises InvalidRequest for a page token that is not one of ours."""
        ...

    async def delete(self, tenant: str, name: str) -> int:
        """Forget a bank with its entries; say how many they were. Raises BankNotFound."""
        ...

    async def erase(self, tenant: str) -> int:
        """Forget all banks of a tenant; say how many entries they had."""
        ...

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
        """Keep what is not there yet; say which were new. All of it or nothing.

        The first entry of a bank says which embedder it has. The entry `stands` stands again if it had lost. Raises
        EmbedderChanged, BankFull, and EntriesMissing where one that loses or wins is not there.
        """
        ...

    async def stage(self, bank: BankRecord, kept: Sequence[Kept], *, embedder: str, max_entries: int) -> None:
        """Put down chunks of a document that nobody sees before `commit_document`. They go after an hour without it.

        Raises EmbedderChanged, BankFull.
        """
        ...

    async def commit_document(self, bank: BankRecord, document_id: str, digest: str, ids: Sequence[str]) -> Committed:
        """Have these chunks, all at once, instead of those that the document had."""
        ...

    async def has_document(self, bank: BankRecord, document_id: str, digest: str) -> bool:
        """Whether it is there with this content, whole."""
        ...

    async def changes(self, tenant: str, name: str, seen: Seen, *, most: int) -> Changes:
        """What has changed, the oldest `most` of it. One round trip. Raises BankNotFound."""
        ...

    async def entries(self, bank: BankRecord, ids: Sequence[str]) -> list[Entry | None]:
        """In the order asked, with None where one is gone."""
        ...

    async def vectors(self, bank: BankRecord, ids: Sequence[str]) -> list[Vector | None]:
        """The same. Raises EmbedderChanged where the bank has another embedder by now."""
        ...

    async def near(self, bank: BankRecord, vector: Vector, most: int) -> list[str]:
        """Ids of entries near the vector, nearly all of the nearest: of a bank that has a vector set."""
        ...

    async def uses(self, bank: BankRecord, ids: Sequence[str]) -> list[Use]: ...

    async def add_uses(self, bank: BankRecord, uses: Mapping[str, Use]) -> None:
        """Count so many recalls more, and when the last of them was. Harmless for entries that are gone."""
        ...

    async def remove(self, bank: BankRecord, entries: Sequence[Entry], *, unused_since_ms: int = 0) -> list[str]:
        """Delete entries; return which were there. Who lost to one of them loses to who it lost to, or stands again.

        With `unused_since_ms` those that were recalled since then stay.
        """
        ...

    async def begin_reembed(self, bank: BankRecord, embedder: str) -> None:
        """From now on `put_vectors` takes this embedder's; those of another that were begun are dropped."""
        ...

    async def put_vectors(self, bank: BankRecord, embedder: str, vectors: Mapping[str, Vector]) -> None:
        """Put down vectors that nobody sees before `finish_reembed`. Raises EmbedderChanged for another's."""
        ...

    async def finish_reembed(self, bank: BankRecord, embedder: str, dim: int, *, at_version: int) -> bool:
        """Have those vectors instead of what the bank had, if nothing has changed since this version.

        Raises EmbedderChanged where they are another embedder's by now.
        """
        ...

    async def available(self) -> bool:
        """One cheap round trip: does the store answer? Never raises."""
        ...

    async def aclose(self) -> None: ...
