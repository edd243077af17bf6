"""KV blocks in this machine's memory: the slots of one slab, evicted by LRU.

A slot is free, reserved (being filled; found by nobody) or published (found by its name; pinned or not). A payload that
its codec made smaller fills the front of its slot: slots are all of one size, so that any block fits into any. What a
slab holds from an earlier life is published from the start, and each payload's checksum verified before its first use.
Knows bytes. Knows no tensors and no store: whoever fills a slot has its buffer.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from enum import Enum, auto
from pathlib import Path
from typing import NamedTuple

import structlog
import xxhash

from cache_store.codecs import RAW
from cache_store.host_slab import Record, Slab
from cache_store.ids import BlockHash, TenantMark, mark_of
from cache_store.store import Encoding

log = structlog.get_logger(__name__)


class SlotState(Enum):
    """The only three things a slot can be."""

    FREE = auto()
    RESERVED = auto()
    PUBLISHED = auto()


class Slot:
    """One block's place in the slab. Its fields are the tier's to change."""

    __slots__ = (
        "arrival",
        "block",
        "buffer",
        "encoding",
        "is_dropped",
        "is_proven",
        "num_tokens",
        "number",
        "pins",
        "state",
    )

    def __init__(self, number: int, buffer: memoryview) -> None:
        self.number = number
        self.buffer = buffer
        """`block_bytes` bytes, page by page in memory already."""
        self.state = SlotState.FREE
        self.block = BlockHash(b"")
        self.num_tokens = 0
        self.encoding = Encoding(RAW, 0)
        """Of what is published."""
        self.pins = 0
        self.is_proven = True
        """False of what an earlier life left, until its checksum has been verified."""
        self.is_dropped = False
        """Of a reserved slot whose block was dropped meanwhile: what comes is not to be found."""
        self.arrival: Future[bool] | None = None
        """Of a reserved slot that somebody waits for."""

    @property
    def payload(self) -> memoryview:
        """What was published: immutable."""
        return self.buffer[: self.encoding.num_bytes]

    @property
    def record(self) -> Record:
        return Record(self.block, self.num_tokens, self.encoding)


class HostUse(NamedTuple):
    blocks: int
    """Slots in use: reserved or published."""
    capacity: int


class HostTier:
    """A bounded LRU of blocks. Any thread may call; no call waits for more than the lock."""

    def __init__(
        self, slab: Slab, *, on_change: Callable[[BlockHash, bool], None] = lambda block, is_here: None
    ) -> None:
        """The tier owns the slab from here on. `on_change` hears of each block that is found from now on, or no more.

        It runs under the lock, and must not call back.
        """
        self._slab = slab
        self._slots = [Slot(number, slab.slot(number)) for number in range(slab.num_slots)]
        self._reserved: dict[BlockHash, Slot] = {}
        self._published: OrderedDict[BlockHash, Slot] = OrderedDict()  # least recently used first
        self._on_change = on_change
        self._lock = threading.Lock()
        self._tick = 0
        self.adopted = self._adopt()
        """Blocks found at the start."""
        self.corrupt = 0
        """Of these, the ones whose payload was wrong when it was first wanted."""
        self._free = [slot for slot in reversed(self._slots) if slot.state is SlotState.FREE]  # low addresses go first

    def _adopt(self) -> int:
        for number, (block, num_tokens, encoding), tick in self._slab.found():
            if block in self._published:  # an assertion's matter in one life; between two, anything may have happened
                self._slab.erase(number)
                continue
            slot = self._slots[number]
            slot.state, slot.block, slot.num_tokens, slot.encoding = SlotState.PUBLISHED, block, num_tokens, encoding
            slot.is_proven = False
            self._published[block] = slot
            self._tick = tick
        return len(self._published)

    @property
    def slab(self) -> memoryview:
        """All slots, for whoever pins them for the device."""
        return self._slab.slots

    @property
    def path(self) -> Path | None:
        """Where the slab lies; None where it is private memory."""
        return self._slab.path

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
        """The slot is filled, with what `encoding` says: from now on it is found, unless it was dropped meanwhile."""
        assert 0 < encoding.num_bytes <= len(slot.buffer), f"{encoding.num_bytes} bytes in a slot of {len(slot.buffer)}"
        if encoding.checksum is None:  # here, once, with the bytes still in the processor's caches
            encoding = encoding._replace(checksum=xxhash.xxh3_64_intdigest(slot.buffer[: encoding.num_bytes]))
        with self._lock:
            arrival = self._unreserve(slot)
            is_kept = not slot.is_dropped
            if is_kept:
                slot.state, slot.encoding, slot.is_proven = SlotState.PUBLISHED, encoding, True
                self._published[slot.block] = slot
                self._slab.write(slot.number, slot.record, self._next_tick())
                self._on_change(slot.block, True)
            else:
                self._release(slot)
        if arrival is not None:
            arrival.set_result(is_kept)

    def abort(self, slot: Slot) -> None:
        """The slot will not be filled."""
        with self._lock:
            arrival = self._unreserve(slot)
            self._release(slot)
        if arrival is not None:
            arrival.set_result(False)

    def awaited(self, block: BlockHash) -> Future[bool] | None:
        """What a reserved block will come to: True once it is published, False when it was aborted or dropped.

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
        """Find a block and keep it here until `unpin`; None when it is not here. Counts as use.

        The first use of what an earlier life left reads all of it, outside the lock: if it is wrong it is not here.
        """
        with self._lock:
            slot = self._published.get(block)
            if slot is None:
                return None
            slot.pins += 1
            self._published.move_to_end(block)
            self._slab.use(slot.number, self._next_tick())
        return slot if slot.is_proven or self._prove(slot) else None

    def _prove(self, slot: Slot) -> bool:
        """Verify a pinned payload's checksum. False when it is wrong: then it is found no more, and the pin is gone."""
        slot.is_proven = xxhash.xxh3_64_intdigest(slot.payload) == slot.encoding.checksum
        if slot.is_proven:
            return True
        with self._lock:
            if self._published.get(slot.block) is slot:  # of several who found it wrong, the first
                self._forget(slot.block)
                self.corrupt += 1
                log.warning("a block in host memory is corrupt", block=slot.block.hex())
        self.unpin(slot)
        return False

    def unpin(self, slot: Slot) -> None:
        """Take back one `pin`. A block dropped meanwhile is gone with its last pin."""
        with self._lock:
            assert slot.state is SlotState.PUBLISHED, f"unpinned a slot that is {slot.state.name}"
            assert slot.pins > 0, "unpinned more often than pinned"
            slot.pins -= 1
            if not slot.pins and self._published.get(slot.block) is not slot:
                self._release(slot)

    def drop(self, blocks: Iterable[BlockHash]) -> int:
        """Forget blocks, also those on their way here; say how many were here.

        A pinned one is found no more, and its slot free once unpinned.
        """
        dropped = 0
        with self._lock:
            for block in blocks:
                if block in self._published:
                    dropped += 1
                    slot = self._forget(block)
                    if not slot.pins:
                        self._release(slot)
                elif block in self._reserved:
                    self._reserved[block].is_dropped = True
        return dropped

    def contains(self, block: BlockHash) -> bool:
        with self._lock:
            return block in self._published

    def blocks(self) -> list[BlockHash]:
        """All that are here, least recently used first."""
        with self._lock:
            return list(self._published)

    def of_tenant(self, tenant: TenantMark) -> list[BlockHash]:
        """Its blocks that are here, and those on their way here."""
        with self._lock:
            return [block for block in (*self._published, *self._reserved) if mark_of(block) == tenant]

    def use(self) -> HostUse:
        with self._lock:
            return HostUse(len(self._slots) - len(self._free), len(self._slots))

    def close(self) -> None:
        """Leave the slab to the next life. The tier is empty from here on, and no slot may be used."""
        with self._lock:
            assert not any(slot.pins for slot in self._slots), "closed while somebody reads"
            assert not self._reserved, "closed while somebody writes"
            self._published.clear()
            self._free, self._slots = [], []
            self._slab.close()

    def check(self) -> None:
        """Prove that every slot is in exactly one state, and every table, and the slab's records, agree with it."""
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
            assert {slot.number: slot.record for slot in self._published.values()} == {
                found.number: found.record for found in self._slab.found() if self._slots
            }
            unreserved = [slot for slot in self._slots if slot.state is not SlotState.RESERVED]
            assert not any(slot.arrival is not None or slot.is_dropped for slot in unreserved)

    def _evicted(self) -> Slot | None:
        slot = next((slot for slot in self._published.values() if not slot.pins), None)
        if slot is not None:
            self._forget(slot.block)
        return slot

    def _forget(self, block: BlockHash) -> Slot:
        """Find a published block no more, in this life or the next."""
        slot = self._published.pop(block)
        self._slab.erase(slot.number)
        self._on_change(block, False)
        return slot

    def _next_tick(self) -> int:
        self._tick += 1
        return self._tick

    def _unreserve(self, slot: Slot) -> Future[bool] | None:
        """Take a slot out of the reserved; whoever waits for it is to be told, outside the lock."""
        assert slot.state is SlotState.RESERVED, f"the slot is {slot.state.name}, not reserved"
        del self._reserved[slot.block]
        arrival, slot.arrival = slot.arrival, None
        return arrival

    def _release(self, slot: Slot) -> None:
        slot.state, slot.block, slot.num_tokens, slot.is_dropped = SlotState.FREE, BlockHash(b""), 0, False
        self._free.append(slot)
