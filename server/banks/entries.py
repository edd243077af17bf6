"""What makes a text an entry of a bank: an id from its content, and a vector of the bank's embedding model."""

from collections.abc import Sequence
from typing import NamedTuple

from cache_store.bank_store import BankStore
from cache_store.banks import BankRecord, Entry, Vector
from cache_store.errors import InvalidRequest
from server.banks import checks
from server.banks.embeds import Embeds


class Vectors(NamedTuple):
    embedder: str
    vectors: list[Vector]
    """One for each text."""


async def vectors_of(
    embedding: Embeds, bank: BankRecord, texts: Sequence[str], fields: Sequence[str], *, is_query: bool = False
) -> Vectors:
    """Raises EmbedderChanged, NoWorker, and InvalidRequest naming the field whose text the model can't read."""
    embedded = await embedding.embed(texts, is_query=is_query, prefer=bank.embedder)
    bank.check_embedder(embedded.embedder)
    for chunks, field in zip(embedded.texts, fields, strict=True):
        if not chunks:
            raise InvalidRequest(field, "has nothing that the embedding model can read")
    return Vectors(embedded.embedder, [chunks[0].vector for chunks in embedded.texts])


def entry_id(store: BankStore, bank: BankRecord, entry: Entry) -> str:
    """From what an entry says, and where: the same again for whoever says it again."""
    place = (entry.document_id, str(entry.chunk), entry.session_id, str(entry.turn))
    return store.name_of(bank.tenant, bank.name, entry.kind.name, entry.text, *place, *checks.flat(entry.metadata))
