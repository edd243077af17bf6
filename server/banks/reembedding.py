"""New vectors for all of a bank, by the embedding model that the workers have now. The bank has its old ones until all
new ones are there; then it has these, at once."""

from collections.abc import AsyncGenerator
from typing import Final

import numpy as np

from cache_store.bank_store import BankStore, Seen
from cache_store.banks import check_bank_name
from cache_store.errors import EmbedderChanged
from server.banks.embeds import Embeds

_AT_ONCE: Final = 64


async def reembed(store: BankStore, embedding: Embeds, tenant: str, name: str) -> AsyncGenerator[tuple[int, int], None]:
    """How many entries are done, of how many. What changes meanwhile is done too.

    Raises EmbedderChanged where the workers' model changes on the way, or another call makes vectors of another one.
    """
    bank = await store.get(tenant, check_bank_name(name))
    embedder, dim = "", 0
    seen, done = Seen(), 0
    while True:
        changes = await store.changes(tenant, name, seen, most=_AT_ONCE)
        if changes.from_nothing:
            done = 0
        texts = [entry.text for entry, _ in changes.kept]
        if texts:
            embedded = await embedding.embed(texts, prefer=embedder)
            if not embedder:
                embedder, dim = embedded.embedder, embedded.dim
                if embedder == bank.embedder:
                    yield bank.entries, bank.entries
                    return
                await store.begin_reembed(bank, embedder)
            elif embedded.embedder != embedder:
                raise EmbedderChanged(name, embedder, embedded.embedder)
            nothing = np.zeros(dim, np.float32)  # of a text that this model can't read
            vectors = [chunks[0].vector if chunks else nothing for chunks in embedded.texts]
            ids = [entry.id for entry, _ in changes.kept]
            await store.put_vectors(bank, embedder, dict(zip(ids, vectors, strict=True)))
            done += len(texts)
            yield min(done, changes.bank.entries), changes.bank.entries
        seen = changes.seen
        if changes.is_last and (
            not embedder or await store.finish_reembed(bank, embedder, dim, at_version=seen.version)
        ):
            return
