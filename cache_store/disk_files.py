"""Blocks as files of one folder: a file is the frame that Redis would hold, under the block's name.

One file a block, because a payload has the size that its codec gave it, LRU then frees just what it should, and beside
the writing of a megabyte the creating of a file is nothing. Knows frames and files. What is kept is the tier's
business. All methods raise OSError for what the disk does. One thread at a time, but for `write` and `read`.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import time_ns
from typing import NamedTuple

from cache_store.errors import BlockCorrupt, BlockForeign
from cache_store.frame import Framer
from cache_store.ids import DIGEST_BYTES, LADDER_MARK, MARK_BYTES, BlockHash
from cache_store.store import Encoding, Fetch, Store

_NAME = re.compile(rf"(?:[0-9a-f]{{2}}){{{DIGEST_BYTES + MARK_BYTES}}}(?:{LADDER_MARK.hex()})?")
_PIECE_BYTES = 256 * 1024
"""Read at once: what was read is still in the processor's caches when its checksum is computed."""


class Kept(NamedTuple):
    """A file found at the start."""

    block: BlockHash
    num_bytes: int
    used_ns: int
    """When it was last used, in nanoseconds of the machine's clock."""


class BlockFiles:
    def __init__(self, folder: Path, framer: Framer) -> None:
        self._folder = folder
        self._framer = framer
        self._left: dict[Path, int] = {}

    @property
    def left_bytes(self) -> int:
        """Size of the files that are to go and that the disk does not let go. Any thread may ask."""
        return sum(list(self._left.values()))

    def scan(self) -> list[Kept]:
        """Every block whose header is right, least recently used first. Other files in the folder are deleted."""
        return sorted(self._scan(), key=lambda kept: kept.used_ns)

    def _scan(self) -> Iterator[Kept]:
        with os.scandir(self._folder) as entries:
            for entry in entries:
                kept = self._judge(entry.name)
                if kept is not None:
                    yield kept
                else:
                    with suppress(OSError):  # it stays, is counted, and nobody finds it
                        if not entry.is_dir(follow_symlinks=False):
                            self._unlink(self._folder / entry.name, entry.stat(follow_symlinks=False).st_size)

    def _judge(self, name: str) -> Kept | None:
        """What a file's header says, if it can be believed."""
        if not _NAME.fullmatch(name):
            return None
        block = BlockHash(bytes.fromhex(name))
        try:
            descriptor = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            about = os.fstat(descriptor)
            header = os.pread(descriptor, self._framer.header_bytes, 0)
            self._framer.read(header, block=block, value_bytes=about.st_size)
        except (BlockCorrupt, BlockForeign, OSError):
            return None
        finally:
            os.close(descriptor)
        return Kept(block, about.st_size, about.st_mtime_ns)

    def write(self, store: Store) -> None:
        """Write a block where nobody finds it. It is there once `publish` has renamed it; then, and where that did not
        come about, `tidy`.

        Not synced: what a loss of power leaves of it is found out by its checksums.
        """
        path = self._unpublished(store.block)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            for part in self._framer.value(store):
                written = 0
                while written < len(part):
                    written += os.write(descriptor, part[written:])
            _mark_used(descriptor)
        finally:
            os.close(descriptor)

    def publish(self, block: BlockHash) -> None:
        path = self._path(block)
        self._unpublished(block).rename(path)
        self._left.pop(path, None)  # it was in this one's place

    def tidy(self, block: BlockHash, num_bytes: int) -> None:
        """Leave nothing of a write, of so many bytes at most, that was not published."""
        self._unlink(self._unpublished(block), num_bytes)

    def read(self, fetch: Fetch) -> Encoding:
        """Read a payload, verified, into the fetch's buffer. Raises BlockCorrupt, BlockForeign; FileNotFoundError."""
        descriptor = os.open(self._path(fetch.block), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            value_bytes = os.fstat(descriptor).st_size
            header = os.read(descriptor, self._framer.header_bytes)
            body = self._framer.body(header, fetch, value_bytes=value_bytes)
            into = body.target
            while into:
                num_bytes = os.readv(descriptor, [into[:_PIECE_BYTES]])
                if not num_bytes:
                    raise BlockCorrupt("the file has become shorter")
                body.seen(into[:num_bytes])
                into = into[num_bytes:]
            encoding = body.finish(os.read(descriptor, body.trailer_bytes))
            _mark_used(descriptor)
        finally:
            os.close(descriptor)
        return encoding

    def delete(self, block: BlockHash, num_bytes: int) -> None:
        """What the disk does not let go of stays in `left_bytes`."""
        self._unlink(self._path(block), num_bytes)

    def delete_left(self) -> None:
        """Try again what could not be deleted. Never raises."""
        for path, num_bytes in list(self._left.items()):
            with suppress(OSError):
                self._unlink(path, num_bytes)

    def _unlink(self, path: Path, num_bytes: int) -> None:
        self._left[path] = num_bytes
        path.unlink(missing_ok=True)
        del self._left[path]

    def _path(self, block: BlockHash) -> Path:
        return self._folder / block.hex()

    def _unpublished(self, block: BlockHash) -> Path:
        return self._path(block).with_suffix(".new")


def _mark_used(descriptor: int) -> None:
    """Let the order of use outlive us. In our words: the file system's own clock is too coarse to tell blocks apart."""
    now_ns = time_ns()
    os.utime(descriptor, ns=(now_ns, now_ns))
