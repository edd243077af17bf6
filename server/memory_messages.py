"""Banks and entries as the proto's messages, and back. Raises InvalidRequest for what no bank takes."""

from cache_store.banks import BankRecord, BankSettings, Entry, EntryFilter, EntryKind
from cache_store.errors import InvalidRequest
from protos import rekindle_memory_pb2 as mpb
from server.banks.keeper import Document, DocumentDone, Recalled


def settings_of(message: mpb.BankSettings) -> BankSettings:
    """What is not set has its default."""
    return BankSettings(**{field.name: value for field, value in message.ListFields()})


def bank_message(record: BankRecord) -> mpb.Bank:
    names = [field.name for field in mpb.BankSettings.DESCRIPTOR.fields]
    return mpb.Bank(
        name=record.name,
        description=record.description,
        created_ms=record.created_ms,
        entries=record.entries,
        documents=record.documents,
        embedder=record.embedder,
        embedding_dim=record.embedding_dim,
        version=record.version,
        settings=mpb.BankSettings(**{name: getattr(record.settings, name) for name in names}),
    )


def entry_message(entry: Entry) -> mpb.MemoryEntry:
    return mpb.MemoryEntry(
        id=entry.id,
        text=entry.text,
        kind=int(entry.kind),  # type: ignore[arg-type]  # a number, as the proto has it
        metadata=entry.metadata,
        importance=entry.importance,
        created_ms=entry.created_ms,
        last_recalled_ms=entry.last_recalled_ms,
        recalls=entry.recalls,
        document_id=entry.document_id,
        chunk=entry.chunk,
        superseded_by=entry.superseded_by,
        session_id=entry.session_id,
        turn=entry.turn,
    )


def recalled_message(recalled: Recalled) -> mpb.RecalledEntry:
    return mpb.RecalledEntry(
        entry=entry_message(recalled.entry),
        score=recalled.score,
        cosine=recalled.cosine,
        bm25=recalled.bm25,
        relevance=recalled.relevance,
        retention=recalled.retention,
    )


def document_of(message: mpb.Document) -> Document:
    given = {"importance": message.importance} if message.HasField("importance") else {}
    return Document(text=message.text, id=message.id, metadata=dict(message.metadata), **given)


def progress_message(done: DocumentDone) -> mpb.PutDocumentsProgress:
    return mpb.PutDocumentsProgress(
        document_id=done.document_id,
        documents_done=done.done,
        documents_in_all=done.in_all,
        chunks=done.chunks,
        new_chunks=done.new_chunks,
        prefilled_chunks=done.prefilled_chunks,
    )


def reembed_message(progress: tuple[int, int]) -> mpb.ReembedProgress:
    done, in_all = progress
    return mpb.ReembedProgress(entries_done=done, entries_in_all=in_all)


def filter_of(message: mpb.EntryFilter) -> EntryFilter:
    try:
        kinds = frozenset(EntryKind(int(kind)) for kind in message.kinds)
    except ValueError as error:
        raise InvalidRequest("filter.kinds", str(error)) from error
    return EntryFilter(
        metadata=dict(message.metadata),
        kinds=kinds,
        created_after_ms=message.created_after_ms,
        created_before_ms=message.created_before_ms,
        document_id=message.document_id,
        session_id=message.session_id,
        not_session_id=message.not_session_id,
    )
