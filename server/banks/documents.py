"""Documents into a bank, cut in chunks. A reader sees all chunks of a document, or those that it had before.

Chunks are put down out of sight as they are embedded, and come in sight together, in place of what the document had.
"""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from cache_store.bank_store import BankStore
from cache_store.banks import BankRecord, Entry, EntryKind, Kept, check_bank_name, plain_name
from cache_store.errors import InvalidRequest, StoreUnavailable
from server.banks import checks
from server.banks.embeds import Embeds
from server.banks.entries import entry_id
from server.banks.prefills import Prefills

_STAGED_AT_ONCE: Final = 64
_TRIES: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    text: str
    id: str = ""
    """Empty: made from its content."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    importance: float = 0.5


class DocumentDone(NamedTuple):
    document_id: str
    done: int
    in_all: int
    """Documents."""
    chunks: int
    new_chunks: int
    """Of this document."""
    prefilled_chunks: int = 0
    """Of this document, the old ones among them, in a bank that keeps KV."""


async def put(
    store: BankStore,
    embedding: Embeds,
    tenant: str,
    name: str,
    documents: Sequence[Document],
    *,
    max_entries: int,
    now: Callable[[], float],
    prefills: Prefills | None = None,
) -> AsyncGenerator[DocumentDone, None]:
    """All are checked before the first is put. One that is there with this content is left alone."""
    _check(documents)
    for number, document in enumerate(documents):
        bank = await store.get(tenant, check_bank_name(name))
        digest = digest_of(document)
        document = replace(document, id=document.id or f"doc-{digest}")
        chunks = new = prefilled = 0
        if not await store.has_document(bank, document.id, digest):
            embedder, kept = await _embed(
                store, embedding, bank, document, f"documents[{number}].text", int(now() * 1000)
            )
            chunks, new = len(kept), await _keep(store, bank, kept, embedder, max_entries=max_entries)
            if prefills is not None and bank.settings.kv_ttl_s:
                # As turns will read them: one that was there already has its own date.
                there = await store.entries(bank, [one.entry.id for one in kept])
                prefilled = await prefills.prefill(bank, [entry for entry in there if entry is not None])
        yield DocumentDone(document.id, number + 1, len(documents), chunks, new, prefilled)


def digest_of(document: Document) -> str:
    """Of its content."""
    return plain_name("document", document.text, *checks.flat(document.metadata))


async def _keep(store: BankStore, bank: BankRecord, kept: Sequence[Kept], embedder: str, *, max_entries: int) -> int:
    """Stage chunks and commit them; how many were new. What others take away meanwhile is staged again."""
    of = kept[0].entry
    by_id = {one.entry.id: one for one in kept}
    missing = list(by_id)
    for _ in range(_TRIES):
        for start in range(0, len(missing), _STAGED_AT_ONCE):
            batch = [by_id[chunk_id] for chunk_id in missing[start : start + _STAGED_AT_ONCE]]
            await store.stage(bank, batch, embedder=embedder, max_entries=max_entries)
        new_entries, missing = await store.commit_document(bank, of.document_id, of.document_digest, list(by_id))
        if not missing:
            return new_entries
    raise StoreUnavailable(f"others put and forget document {of.document_id} all the time")


def _check(documents: Sequence[Document]) -> None:
    if not 1 <= len(documents) <= checks.MAX_DOCUMENTS:
        raise InvalidRequest("documents", f"must be 1 to {checks.MAX_DOCUMENTS:,}, got {len(documents)}")
    for number, document in enumerate(documents):
        at = f"documents[{number}]"
        if document.id:
            check_bank_name(document.id, f"{at}.id")
        checks.check_text(document.text, f"{at}.text", most=checks.MAX_DOCUMENT_BYTES)
        checks.check_metadata(document.metadata, f"{at}.metadata")
        checks.check_importance(document.importance, f"{at}.importance")


async def _embed(
    store: BankStore, embedding: Embeds, bank: BankRecord, document: Document, field: str, now_ms: int
) -> tuple[str, list[Kept]]:
    """The embedder, and the document's chunks."""
    embedded = await embedding.embed(
        [document.text],
        chunk_tokens=bank.settings.chunk_tokens,
        overlap_tokens=bank.settings.overlap_tokens,
        prefer=bank.embedder,
    )
    bank.check_embedder(embedded.embedder)
    [chunks] = embedded.texts
    if not chunks:
        raise InvalidRequest(field, "has nothing that the embedding model can read")
    checks.check_chunks(len(chunks), field)
    whole = Entry(
        id="",
        text="",
        kind=EntryKind.DOCUMENT,
        metadata=dict(document.metadata),
        importance=document.importance,
        created_ms=now_ms,
        document_id=document.id,
        document_digest=digest_of(document),
    )
    kept = []
    for place, chunk in enumerate(chunks):
        entry = replace(whole, text=document.text[chunk.start : chunk.end], chunk=place)
        kept.append(Kept(replace(entry, id=entry_id(store, bank, entry)), chunk.vector))
    return embedded.embedder, kept
