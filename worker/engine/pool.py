"""Which device blocks are free, used or cached, and which block holds what. Counts and ids only: no tensor here.

A block is in one of three states: *free* (holds nothing), *used* (somebody refers to it), or *cached* (nobody does, but
its content has a name and can be found again until it is evicted). Used by the engine's thread alone.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from cache_store.ids import BlockHash
from worker.block_changes import Told
from worker.ids import BlockId


class PoolStats(NamedTuple):
    free: int
    used: int
    cached: int


class BlockPool:
    """`num_blocks` blocks with reference counts, an index by content, and LRU eviction of what nobody refers to.

    Whoever refers to a block refers to all before it in its chain, and `release` lets go of the last first: so the
    least recently used block is always a leaf.
    """

    def __init__(self, num_blocks: int, *, on_change: Told = lambda name, is_here: None) -> None:
        """`on_change` hears of each content that can be found from now on, or no more."""
        self.num_blocks = num_blocks
        self._on_change = on_change
        self._free = np.ones(num_blocks, dtype=bool)
        self._num_free = num_blocks
        self._users: dict[BlockId, int] = {}
        self._cached: OrderedDict[BlockId, None] = OrderedDict()  # oldest first
        self._by_hash: dict[BlockHash, BlockId] = {}
        self._hash_of: dict[BlockId, BlockHash] = {}
        self._lossy: set[BlockId] = set()
        self._evicted: OrderedDict[BlockHash, None] = OrderedDict()  # the latest, to notice regret
        self.evicted_then_needed = 0

    @property
    def available(self) -> int:
        """How many blocks `take` could hand out now."""
        return self._num_free + len(self._cached)

    def find(self, name: BlockHash) -> BlockId | None:
        """Which block holds this content, if any (no reference is taken)."""
        return self._by_hash.get(name)

    def names(self) -> list[BlockHash]:
        """All contents that can be found."""
        return list(self._by_hash)

    def need(self, name: BlockHash) -> None:
        """Note that this content was wanted and not found: count it if it was here and evicted."""
        if self._evicted.pop(name, False) is None:
            self.evicted_then_needed += 1

    def acquire(self, blocks: Iterable[BlockId]) -> None:
        """Refer to used or cached blocks once more: they stay until `release`."""
        for block in blocks:
            users = self._users.get(block, 0)
            if users == 0:
                del self._cached[block]  # KeyError: the block is free, and our caller wrong
            self._users[block] = users + 1

    def take(self, count: int, *, after: BlockId | None = None, room: int = 0) -> list[BlockId] | None:
        """Hand out `count` blocks with one reference each, or None: all or nothing. Evicts the least recently used.

        Neighbours where possible: first what follows `after`, then a run with space for `room` blocks, so that a
        sequence can grow in place.
        """
        if count > self.available:
            return None
        taken: list[BlockId] = []
        if after is not None:
            following = after + 1
            while len(taken) < count and following < self.num_blocks and self._free[following]:
                taken.append(self._occupy(following))
                following += 1
        if len(taken) < count and self._num_free:
            taken += [self._occupy(index) for index in self._free_run(count - len(taken), room)]
        while len(taken) < count:
            taken.append(self._occupy(self._evict_oldest()))
        return taken

    def name(self, block: BlockId, name: BlockHash) -> bool:
        """Make a used block findable by its content. False if another block holds the same already."""
        assert block in self._users, f"block {block} is named, but nobody uses it"
        if name in self._by_hash:
            return False
        assert block not in self._hash_of, f"block {block} is named twice"
        self._by_hash[name] = block
        self._hash_of[block] = name
        self._on_change(name, True)
        self._evicted.pop(name, None)
        return True

    def is_named(self, block: BlockId) -> bool:
        return block in self._hash_of

    def mark_lossy(self, block: BlockId) -> None:
        """Note that a used block has KV from a lossy payload, and may not be encoded again, until it is free."""
        assert block in self._users, f"block {block} is marked, but nobody uses it"
        self._lossy.add(block)

    def is_lossy(self, block: BlockId) -> bool:
        return block in self._lossy

    def release(self, blocks: Sequence[BlockId]) -> None:
        """Let go of blocks of one chain, given first to last. What has a name stays cached."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            del self._users[block]
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._set_free(block)

    def drop(self, names: Iterable[BlockHash]) -> int:
        """Forget contents. Blocks that nobody uses become free and are counted; used ones only lose their name."""
        dropped = 0
        for name in names:
            block = self._by_hash.pop(name, None)
            if block is None:
                continue
            del self._hash_of[block]
            self._on_change(name, False)
            if block in self._cached:
                del self._cached[block]
                self._set_free(block)
                dropped += 1
        return dropped

    def stats(self) -> PoolStats:
        return PoolStats(free=self._num_free, used=len(self._users), cached=len(self._cached))

    def check(self) -> None:
        """Prove that every block is in exactly one state and every name leads to a block that bears it."""
        free = {BlockId(int(index)) for index in np.flatnonzero(self._free)}
        used, cached = set(self._users), set(self._cached)
        assert self._num_free == len(free), f"{self._num_free} counted free, {len(free)} are"
        assert not free & used, f"free and used: {free & used}"
        assert not free & cached, f"free and cached: {free & cached}"
        assert not used & cached, f"used and cached: {used & cached}"
        assert len(free) + len(used) + len(cached) == self.num_blocks, "a block leaked"
        assert all(count > 0 for count in self._users.values()), "a used block has no user"
        assert cached <= set(self._hash_of), "a cached block has no name"
        assert {block: name for name, block in self._by_hash.items()} == self._hash_of, "names and blocks disagree"
        assert not free & set(self._hash_of), "a free block has a name"
        assert not free & self._lossy, "a free block is marked"

    def _free_run(self, count: int, room: int) -> list[int]:
        """Up to `count` free blocks: of the smallest run that fits `room`, else `count`, else of the longest runs."""
        padded = np.concatenate(([False], self._free, [False]))
        edges = np.flatnonzero(padded[1:] != padded[:-1])
        starts, lengths = edges[0::2], edges[1::2] - edges[0::2]
        for wanted in (max(room, count), count):
            fitting = np.flatnonzero(lengths >= wanted)
            if len(fitting):
                start = int(starts[fitting[np.argmin(lengths[fitting])]])
                return list(range(start, start + count))
        chosen: list[int] = []
        for run in np.argsort(-lengths, kind="stable"):
            chosen += range(int(starts[run]), int(starts[run] + lengths[run]))
            if len(chosen) >= count:
                break
        return chosen[:count]

    def _occupy(self, index: int) -> BlockId:
        block = BlockId(index)
        self._free[index] = False
        self._num_free -= 1
        self._users[block] = 1
        return block

    def _set_free(self, block: BlockId) -> None:
        self._free[block] = True
        self._num_free += 1
        self._lossy.discard(block)

    def _evict_oldest(self) -> BlockId:
        block, _ = self._cached.popitem(last=False)
        name = self._hash_of.pop(block)
        del self._by_hash[name]
        self._on_change(name, False)
        self._evicted[name] = None
        if len(self._evicted) > 4 * self.num_blocks:
            self._evicted.popitem(last=False)
        self._set_free(block)
        return block
