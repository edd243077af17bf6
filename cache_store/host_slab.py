"""The memory of a host tier: one slab of fixed-size slots, and beside them a record of what each slot holds.

As a file in shared memory it outlives its worker, however that ends, and the next worker of the same model and size
finds what the records say. A slot's record is erased before the slot is written and written after it, and bears its
own checksum, so that nothing half done is believed. Knows bytes. What is kept, and how long, is the tier's business.
"""

import mmap
import os
import struct
import sys
import time
from pathlib import Path
from typing import NamedTuple, Self

import structlog
import xxhash

from cache_store.codecs import find
from cache_store.host_claim import Claim, claim_file, forget_abandoned
from cache_store.ids import BlockHash
from cache_store.store import DELETIONS_KNOWN_S, Encoding

log = structlog.get_logger(__name__)

_MAGIC, _VERSION = b"RKSLAB\x00\x01", 2
_HEADER = struct.Struct("<8sIIQQ16s")
"""magic, version, block bytes, slots, where the slots begin, model. Its xxh3_64 follows."""
_RECORD = struct.Struct("<25sBQIIBB4x")
"""block and its length (25 where it is a ladder's), payload's xxh3_64, payload bytes, tokens, codec, codec's version.
The record's own xxh3_64 follows, which covers the slot's number too; then the tick of the last use, which nothing
covers: it is written alone."""
_U64 = struct.Struct("<Q")
_TICK_AT = _RECORD.size + _U64.size
_RECORD_BYTES = 64
_NAME = "rekindle-slab-"
_STALE_S = 3600.0
"""A slab that nobody has held or written for so long is deleted by the next worker that starts beside it."""
_TOUCH_EVERY_S = 60.0


class Record(NamedTuple):
    """What a slot holds."""

    block: BlockHash
    num_tokens: int
    encoding: Encoding
    """With its checksum."""


class Found(NamedTuple):
    """What a slot held when the slab was opened."""

    number: int
    record: Record
    tick: int
    """Of its last use: the higher the later."""


class Slab:
    """`num_slots` slots of `block_bytes`, page by page in memory. One thread at a time writes records."""

    def __init__(self, memory: mmap.mmap, *, num_slots: int, block_bytes: int, claim: Claim | None) -> None:
        self.num_slots = num_slots
        self.block_bytes = block_bytes
        first = _slots_at(num_slots)
        whole = memoryview(memory)
        self.slots = whole[first : first + num_slots * block_bytes]
        self._records = whole[mmap.PAGESIZE :]
        self._claim = claim
        self._touched_s = time.monotonic()

    @classmethod
    def private(cls, *, capacity_bytes: int, block_bytes: int) -> Self:
        """Memory of this process alone: as many slots as fit `capacity_bytes` (0: none)."""
        num_slots = capacity_bytes // block_bytes
        memory = mmap.mmap(-1, _file_bytes(num_slots, block_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for page in range(0, len(memory), mmap.PAGESIZE):
            memory[page] = 0  # a page's first touch is some 20 times slower than the next: not in a turn's way
        return cls(memory, num_slots=num_slots, block_bytes=block_bytes, claim=None)

    @classmethod
    def shared(cls, folder: Path, model: bytes, *, capacity_bytes: int, block_bytes: int) -> Self:
        """A file in `folder`: one of this model (16 bytes) and size that nobody holds, or a new one. Raises OSError.

        Its memory is had when this returns: there is no running out of it later.
        """
        num_slots = capacity_bytes // block_bytes
        forget_abandoned(folder, f"{_NAME}*", older_than_s=DELETIONS_KNOWN_S)  # whoever claims one uses what is in it
        claim = claim_file(folder, f"{_NAME}{model.hex()}-{block_bytes}x{num_slots}")
        forget_abandoned(folder, f"{_NAME}*", older_than_s=_STALE_S)
        try:
            memory = _mapped(claim, _header(model, num_slots, block_bytes), _file_bytes(num_slots, block_bytes))
        except BaseException:
            claim.path.unlink()
            claim.release()
            raise
        return cls(memory, num_slots=num_slots, block_bytes=block_bytes, claim=claim)

    @property
    def path(self) -> Path | None:
        """Where it lies; None for private memory."""
        return self._claim.path if self._claim is not None else None

    def slot(self, number: int) -> memoryview:
        return self.slots[number * self.block_bytes : (number + 1) * self.block_bytes]

    def found(self) -> list[Found]:
        """What the records say, least recently used first. A payload's own checksum is not looked at."""
        there = ((number, self._read(number)) for number in range(self.num_slots))
        found = [Found(number, record, self._tick(number)) for number, record in there if record is not None]
        return sorted(found, key=lambda slot: slot.tick)

    def write(self, number: int, record: Record, tick: int) -> None:
        """A slot is filled, with this: from now on it is believed."""
        fields = _fields(record)
        at = number * _RECORD_BYTES
        _U64.pack_into(self._records, at + _TICK_AT, tick)
        self._records[at : at + _TICK_AT] = fields + _U64.pack(_checksum(number, fields))
        if self._claim is not None and time.monotonic() - self._touched_s > _TOUCH_EVERY_S:
            self._touched_s = time.monotonic()
            self._claim.touch()

    def erase(self, number: int) -> None:
        """What a slot holds is believed no more."""
        at = number * _RECORD_BYTES
        self._records[at : at + _RECORD_BYTES] = bytes(_RECORD_BYTES)

    def use(self, number: int, tick: int) -> None:
        _U64.pack_into(self._records, number * _RECORD_BYTES + _TICK_AT, tick)

    def close(self) -> None:
        """Leave it to the next worker. Nothing may be written from here on."""
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def _tick(self, number: int) -> int:
        tick: int = _U64.unpack_from(self._records, number * _RECORD_BYTES + _TICK_AT)[0]
        return tick

    def _read(self, number: int) -> Record | None:
        at = number * _RECORD_BYTES
        fields = bytes(self._records[at : at + _RECORD.size])
        if _U64.unpack_from(self._records, at + _RECORD.size)[0] != _checksum(number, fields):
            return None  # never written, erased, or not written to its end
        block, block_bytes, checksum, num_bytes, num_tokens, codec_id, codec_version = _RECORD.unpack(fields)
        codec = find(codec_id, codec_version)
        if codec is None or not 0 < num_bytes <= self.block_bytes:
            return None  # another version of this program wrote it
        return Record(BlockHash(block[:block_bytes]), num_tokens, Encoding(codec, num_bytes, checksum))


def open_slab(folder: Path | None, model: bytes, *, capacity_bytes: int, block_bytes: int) -> Slab:
    """A slab in `folder`, or in private memory where there is no folder or no room in it (which is logged)."""
    if folder is not None and sys.platform == "linux":
        try:
            return Slab.shared(folder, model, capacity_bytes=capacity_bytes, block_bytes=block_bytes)
        except OSError as error:
            log.warning("the host cache will not outlive this worker", folder=str(folder), error=str(error))
    return Slab.private(capacity_bytes=capacity_bytes, block_bytes=block_bytes)


def _mapped(claim: Claim, header: bytes, num_bytes: int) -> mmap.mmap:
    """A claimed file in memory. What is not of this very shape begins anew, empty."""
    assert sys.platform == "linux"
    is_ours = os.pread(claim.descriptor, len(header), 0) == header
    if not is_ours or os.fstat(claim.descriptor).st_size != num_bytes:
        os.ftruncate(claim.descriptor, 0)
    os.posix_fallocate(claim.descriptor, 0, num_bytes)  # what is there stays; the rest is zeros
    os.pwrite(claim.descriptor, header, 0)
    return mmap.mmap(claim.descriptor, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)


def _header(model: bytes, num_slots: int, block_bytes: int) -> bytes:
    assert len(model) == 16, f"{len(model)} bytes name no model"
    fields = _HEADER.pack(_MAGIC, _VERSION, block_bytes, num_slots, _slots_at(num_slots), model)
    return fields + _U64.pack(xxhash.xxh3_64_intdigest(fields))


def _slots_at(num_slots: int) -> int:
    """Where the slots begin: after a page for the header, and pages for the records."""
    return mmap.PAGESIZE * (1 + -(-num_slots * _RECORD_BYTES // mmap.PAGESIZE))


def _file_bytes(num_slots: int, block_bytes: int) -> int:
    return _slots_at(num_slots) + num_slots * block_bytes


def _fields(record: Record) -> bytes:
    codec, num_bytes, checksum = record.encoding
    assert checksum is not None
    return _RECORD.pack(
        record.block, len(record.block), checksum, num_bytes, record.num_tokens, codec.id, codec.version
    )


def _checksum(number: int, fields: bytes) -> int:
    return xxhash.xxh3_64_intdigest(_U64.pack(number) + fields)
