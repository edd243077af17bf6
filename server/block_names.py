"""The names of sessions' blocks, kept from one turn to the next: a history only grows, and so do its names.

Bounded by names, not by sessions: one long conversation has as many as hundreds of short ones.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from cache_store.ids import BlockHash, chain
from cache_store.inserts import NO_INSERTS, Inserts

MOST_NAMES = 1 << 17
"""About 8 MiB. A name that is not kept is made again in microseconds."""


class BlockNames:
    def __init__(self, block_tokens: int, *, most_names: int = MOST_NAMES) -> None:
        """Keeps those of the sessions that were asked for last."""
        self._block_tokens = block_tokens
        self._most_names = most_names
        self._names: OrderedDict[Hashable, list[BlockHash]] = OrderedDict()
        self._num_names = 0

    def of(
        self, tokens: Sequence[int], root: BlockHash, session: Hashable | None, inserts: Inserts = NO_INSERTS
    ) -> Sequence[BlockHash]:
        """Of the full blocks. Whenever the same `session` comes again its tokens go on from what they were, or end
        earlier, and its root is the same; None is no session, and kept nowhere. Nor is what has inserts: they may be
        lost."""
        size = self._block_tokens
        if inserts.bounds:
            session = None
        names = self._names.pop(session, []) if session is not None else []
        self._num_names -= len(names)
        del names[len(tokens) // size :]
        for start in range(len(names) * size, len(tokens) // size * size, size):
            salt = inserts.salt(tokens, start, start + size)
            names.append(chain(names[-1] if names else root, tokens[start : start + size], salt))
        if session is not None and names:
            self._names[session] = names
            self._num_names += len(names)
            while self._num_names > self._most_names:
                _, oldest = self._names.popitem(last=False)
                self._num_names -= len(oldest)
        return names

    def __len__(self) -> int:
        """How many names are kept."""
        return self._num_names
