"""KV blocks in this machine's memory: one slab, allocated and touched at start, cut into slots, evicted by LRU.

A slot is free, reserved (being filled; found by nobody) or published (found by its name; pinned or not). A payload that
its codec made smaller fills the front of its slot: slots are all of one size, so that any block fits into any. Knows
bytes. Knows no tensors and no store: whoever fills a slot has its buffer.
"""

import mmap
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from enum import Enum, auto
from typing import NamedTuple

import xxhash

from cache_store.codecs import RAW
from cache_store.ids import BlockHash
from cache_store.store import Encoding


class SlotState(Enum):
    """The only three things a slot can be."""

    FREE = auto()
    RESERVED = auto()
    PUBLISHED = auto()


class Slot:
    """One block's place in the slab. Its fields are the tier's to change."""

    __slots__ = ("arrival", "block", "buffer", "encoding", "num_tokens", "pins", "state")

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        """`block_bytes` bytes, page by page in memory already."""
        self.state = SlotState.FREE
        self.block = BlockHash(b"")
        self.num_tokens = 0
        self.encoding = Encoding(RAW, 0)
        """Of what is published."""
        self.pins = 0
        self.arrival: Future[bool] | None = None
        """Of a reserved slot that somebody waits for."""

    @property
    def payload(self) -> memoryview:
        """What was published: immutable."""
        return self.buffer[: self.encoding.num_bytes]


class HostUse(NamedTuple):
    blocks: int
    """Slots in use: reserved or published."""
    capacity: int


class HostTier:
    """A bounded LRU of blocks. Any thread may call; no call waits for more than the lock."""

    def __init__(
        self, *, capacity_bytes: int, block_bytes: int, on_evict: Callable[[BlockHash], None] | None = None
    ) -> None:
        """As many slots as fit `capacity_bytes` (0: none). `on_evict` runs under the lock: it must not call back."""
        assert block_bytes > 0
        assert capacity_bytes >= 0
        num_slots = capacity_bytes // block_bytes
        slab = mmap.mmap(-1, max(num_slots * block_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._slab = memoryview(slab)[: num_slots * block_bytes]
        for page in range(0, len(self._slab), mmap.PAGESIZE):
            self._slab[page] = 0  # a page's first touch is some 20 times slower than the next: not in a turn's way
        self._slots = [Slot(self._slab[at : at + block_bytes]) for at in range(0, len(self._slab), block_bytes)]
        self._free = self._slots[::-1]  # taken from the end: low addresses first
        self._reserved: dict[BlockHash, Slot] = {}
        self._published: OrderedDict[BlockHash, Slot] = OrderedDict()  # least recently used first
        self._on_evict = on_evict
        self._lock = threading.Lock()

    @property
    def slab(self) -> memoryview:
        """All of it, for whoever pins it for the device."""
        return self._slab

    def reserve(self, block: BlockHash, num_tokens: int) -> Slot | None:
        """A slot to fill, then to `publish` or `abort`; evicts the least recently used block that nobody has pinned.

        None when the block is here already (or on its way), or when there is no room.
        """
        with self._lock:
            if block in self._published or block in self._reserved:
                return None
            slot = self._free.pop() if self._free else self._evicted()
            if slot is None:
                return None
            slot.state, slot.block, slot.num_tokens = SlotState.RESERVED, block, num_tokens
            self._reserved[block] = slot
            return slot

    def publish(self, slot: Slot, encoding: Encoding) -> None:
        """The slot is filled, with what `encoding` says: from now on it is found."""
        assert 0 < encoding.num_bytes <= len(slot.buffer), f"{encoding.num_bytes} bytes in a slot of {len(slot.buffer)}"
        if encoding.checksum is None:  # here, once, with the bytes still in the processor's caches
            encoding = encoding._replace(checksum=xxhash.xxh3_64_intdigest(slot.buffer[: encoding.num_bytes]))
        with self._lock:
            arrival = self._unreserve(slot)
            slot.state, slot.encoding = SlotState.PUBLISHED, encoding
            self._published[slot.block] = slot
        if arrival is not None:
            arrival.set_result(True)

    def abort(self, slot: Slot) -> None:
        """The slot will not be filled."""
        with self._lock:
            arrival = self._unreserve(slot)
            self._release(slot)
        if arrival is not None:
            arrival.set_result(False)

    def awaited(self, block: BlockHash) -> Future[bool] | None:
        """What a reserved block will come to: True once it is published, False when it was aborted.

        None when it is not on its way: it is here, or nobody is bringing it. All who ask share one future, which
        can't be cancelled; what is added as its callback runs on the thread that publishes or aborts, outside the lock.
        """
        with self._lock:
            slot = self._reserved.get(block)
            if slot is None:
                return None
            if slot.arrival is None:
                slot.arrival = Future()
                slot.arrival.set_running_or_notify_cancel()  # from here on `cancel` does nothing
            return slot.arrival

    def pin(self, block: BlockHash) -> Slot | None:
        """Find a block and keep it here until `unpin`; None when it is not here. Counts as use."""
        with self._lock:
            slot = self._published.get(block)
            if slot is not None:
                slot.pins += 1
                self._published.move_to_end(block)
            return slot

    def unpin(self, slot: Slot) -> None:
        """Take back one `pin`. A block dropped meanwhile is gone with its last pin."""
        with self._lock:
            assert slot.state is SlotState.PUBLISHED, f"unpinned a slot that is {slot.state.name}"
            assert slot.pins > 0, "unpinned more often than pinned"
            slot.pins -= 1
            if not slot.pins and self._published.get(slot.block) is not slot:
                self._release(slot)

    def drop(self, blocks: Iterable[BlockHash]) -> int:
        """Forget blocks; say how many were here. A pinned one is found no more, and its slot free once unpinned."""
        dropped = 0
        with self._lock:
            for block in blocks:
                slot = self._published.pop(block, None)
                if slot is not None:
                    dropped += 1
                    if not slot.pins:
                        self._release(slot)
        return dropped

    def contains(self, block: BlockHash) -> bool:
        with self._lock:
            return block in self._published

    def use(self) -> HostUse:
        with self._lock:
            return HostUse(len(self._slots) - len(self._free), len(self._slots))

    def check(self) -> None:
        """Prove that every slot is in exactly one state, and every table agrees with it."""
        with self._lock:
            states = Counter(slot.state for slot in self._slots)
            leaving = [
                slot
                for slot in self._slots
                if slot.state is SlotState.PUBLISHED and self._published.get(slot.block) is not slot
            ]
            assert len({id(slot) for slot in self._free}) == len(self._free) == states[SlotState.FREE]
            assert all(slot.state is SlotState.FREE for slot in self._free)
            assert len(self._reserved) == states[SlotState.RESERVED]
            assert len(self._published) + len(leaving) == states[SlotState.PUBLISHED]
            assert all(slot.pins for slot in leaving), "dropped, unpinned, and not free"
            for table, state in ((self._reserved, SlotState.RESERVED), (self._published, SlotState.PUBLISHED)):
                assert all(slot.state is state and slot.block == block for block, slot in table.items())
            assert all(not slot.pins for slot in self._slots if slot.state is not SlotState.PUBLISHED)
            assert all(slot.arrival is None for slot in self._slots if slot.state is not SlotState.RESERVED)

    def _evicted(self) -> Slot | None:
        slot = next((slot for slot in self._published.values() if not slot.pins), None)
        if slot is not None:
            del self._published[slot.block]
            if self._on_evict is not None:
                self._on_evict(slot.block)
        return slot

    def _unreserve(self, slot: Slot) -> Future[bool] | None:
        """Take a slot out of the reserved; whoever waits for it is to be told, outside the lock."""
        assert slot.state is SlotState.RESERVED, f"the slot is {slot.state.name}, not reserved"
        del self._reserved[slot.block]
        arrival, slot.arrival = slot.arrival, None
        return arrival

    def _release(self, slot: Slot) -> None:
        slot.state, slot.block, slot.num_tokens = SlotState.FREE, BlockHash(b""), 0
        self._free.append(slot)
