"""A conversation as far as it is committed: what its blocks are called."""

from collections.abc import Sequence
from dataclasses import dataclass

from cache_store.ids import BlockHash
from cache_store.inserts import Inserts
from worker.engine.epochs import Beyond
from worker.engine.prefix import Salts, Wanted, full_names, wanted_by_history
from worker.tiers.moves import Content, content_of


@dataclass(frozen=True, slots=True)
class History:
    tenant: str
    tokens: Sequence[int]
    codec: str
    """The session's: what is kept in another fidelity has other names."""
    root: BlockHash
    block_tokens: int
    beyond: Beyond | None = None
    inserts: Inserts | None = None

    @property
    def salts(self) -> Salts | None:
        return self.beyond or self.inserts

    def wanted(self) -> list[Wanted]:
        """All of its blocks."""
        return wanted_by_history(self.root, self.tokens, self.block_tokens, self.salts)

    def needed(self) -> list[Wanted]:
        """Those that its next turn needs from the start."""
        wanted = self.wanted()
        if self.beyond is None:
            return wanted
        spans, size = self.beyond.epochs.needed(len(self.tokens)), self.block_tokens
        return [want for want in wanted if any(span.start <= want.index * size < span.end for span in spans)]

    def names(self) -> list[BlockHash]:
        """Of every block that holds any of its tokens and no others: a last block that a later turn filled up too."""
        full = full_names(self.root, self.tokens, self.block_tokens, self.salts)
        return list(dict.fromkeys([*(want.name for want in self.wanted()), *full]))

    def content(self, want: Wanted) -> Content:
        return content_of(want, self.block_tokens, self.codec, self.tenant, self.beyond)
