"""One KV block as one self-describing value: 64 bytes of header, then the payload as its codec wrote it.

Knows bytes and checksums. Knows no store. The header is checked before a byte of payload is believed, and its checksum
covers the payload's: nothing of a value can change unseen. It also covers the block's name, which the value does not
carry, so that a whole value under the wrong name is refused too.

With master keys the payload is sealed: a seal follows the header, and what the cipher adds follows the payload. Header,
name and tenant are what is authenticated with it, and the payload's checksum, which would tell of it, is left out.
"""

import hashlib
import struct
import threading
from collections.abc import Callable
from typing import NamedTuple

import xxhash

from cache_store.codecs import RAW, CodecInfo, allowed, fidelity_kind, find
from cache_store.errors import BlockCorrupt, BlockForeign
from cache_store.ids import BlockHash
from cache_store.layout import KVLayout
from cache_store.sealing import SEAL_BYTES, TAG_BYTES, KeyUnknown, Opening, SealBroken, Sealer
from cache_store.store import Encoding, Fetch, Store

HEADER_BYTES = 64

_FIELDS = struct.Struct("<4sHBB5HBBI16sQI4x")
"""magic, version, codec, dtype; layers, kv heads, head dim, block tokens, tokens; codec's version, fidelity kind;
payload bytes, fingerprint, payload's xxh3_64 (0 where it is sealed), first position; 4 bytes to spare. The header's own
xxh3_64 follows."""
_CHECKSUM = struct.Struct("<Q")
_MAGIC = b"RKV\x01"
_VERSION = 2
_SEALED_VERSION = 3
_DTYPES = {"float32": 1, "bfloat16": 2, "float16": 3}


class Frame(NamedTuple):
    """What a header says of its payload."""

    codec: CodecInfo
    fidelity_kind: int
    """As `cache_store.codecs.fidelity_kind` counts."""
    num_tokens: int
    first_position: int
    """Index in the conversation of the block's first token."""
    num_bytes: int
    checksum: int
    """The payload's xxh3_64; 0 where it is sealed."""


class Body:
    """The rest of a value, behind its header, as it is received: `target` is to be filled, each piece shown to `seen`
    in its order, then `finish` told the `trailer_bytes` that follow. Only then is the payload to be believed."""

    def __init__(
        self,
        target: memoryview,
        seen: Callable[[memoryview], object],
        trailer_bytes: int,
        finish: Callable[[bytes], Encoding],
    ) -> None:
        self.target = target
        """Of the fetch's buffer, what the payload fills."""
        self.seen = seen
        self.trailer_bytes = trailer_bytes
        self.finish = finish
        """How the payload is to be read. Raises BlockCorrupt."""


def model_digest(fingerprint: bytes) -> bytes:
    """16 bytes of a fingerprint: what tells a model's blocks from others where they are kept."""
    return hashlib.blake2b(fingerprint, digest_size=16).digest()


class Framer:
    """Writes and judges the values of one model's blocks."""

    def __init__(self, layout: KVLayout, fingerprint: bytes, sealer: Sealer | None = None) -> None:
        """With a `sealer` all values are sealed, and no others are believed."""
        self.model = model_digest(fingerprint)
        self._block_bytes = layout.block_bytes
        shape = (layout.num_layers, layout.num_kv_heads, layout.head_dim, layout.block_tokens)
        self._model = (_DTYPES[layout.dtype], *shape, self.model)
        self._sealer = sealer
        self._version = _SEALED_VERSION if sealer else _VERSION
        self.header_bytes = HEADER_BYTES + (SEAL_BYTES if sealer else 0)
        """What goes before a payload."""
        self._trailer_bytes = TAG_BYTES if sealer else 0
        self._scratch = _Scratch(layout.block_bytes + TAG_BYTES)

    @property
    def overhead_bytes(self) -> int:
        """What a value has besides its payload."""
        return self.header_bytes + self._trailer_bytes

    def value(self, store: Store, *, like: bytes | None = None) -> list[bytes | memoryview]:
        """A block's whole value in parts. A sealed one lies where this thread's next one will: use it before that.

        `like` is the header of another value of this block, for whose tenant this one is then sealed. Raises
        BlockForeign where that can't be.
        """
        header, payload = self.header(store), store.payload.cast("B")
        if self._sealer is None:
            return [header, payload]
        about, into = store.block + header, self._scratch.buffer[: len(payload) + TAG_BYTES]
        if like is None:
            seal = self._sealer.seal(store.tenant, payload, into, about=about)
        else:
            try:
                seal = self._sealer.seal_like(like[HEADER_BYTES:], payload, into, about=about)
            except KeyUnknown as error:
                raise BlockForeign(f"sealed {error}") from error
        return [header + seal, into]

    def header(self, store: Store) -> bytes:
        """The 64 bytes that go before `store.payload`, or its seal: all of the block, filled or not."""
        num_bytes, codec = store.payload.nbytes, store.codec
        assert num_bytes <= self._block_bytes, f"{num_bytes} bytes for a block of {self._block_bytes}"
        assert codec is not RAW or num_bytes == self._block_bytes, f"{num_bytes} raw bytes of {self._block_bytes}"
        dtype, *shape, fingerprint = self._model
        fields = _FIELDS.pack(
            _MAGIC,
            self._version,
            codec.id,
            dtype,
            *shape,
            store.num_tokens,
            codec.version,
            fidelity_kind(store.fidelity),
            num_bytes,
            fingerprint,
            0 if self._sealer else _checksum_of(store),
            store.first_position,
        )
        return fields + _CHECKSUM.pack(_header_checksum(store.block, fields))

    def read(self, header: bytes, *, block: BlockHash, value_bytes: int) -> Frame:
        """Read a header, or raise BlockCorrupt, or BlockForeign for what is whole and not for us to read.

        `header` is the value's first `header_bytes` (all of it where it is shorter) and `value_bytes` its whole length.
        """
        if len(header) < HEADER_BYTES:
            raise BlockCorrupt(f"{len(header)} bytes are no header")
        (
            magic,
            version,
            codec_id,
            dtype,
            *shape,
            tokens,
            codec_version,
            kind,
            num_bytes,
            fingerprint,
            checksum,
            first,
        ) = _FIELDS.unpack_from(header)
        if magic != _MAGIC:
            raise BlockCorrupt(f"magic {magic!r}, expected {_MAGIC!r}")
        if version != self._version:
            raise BlockForeign(f"written as version {version}, expected {self._version}")
        if _CHECKSUM.unpack_from(header, _FIELDS.size) != (_header_checksum(block, header[: _FIELDS.size]),):
            raise BlockCorrupt("the header's checksum is wrong")
        if value_bytes != self.overhead_bytes + num_bytes:
            raise BlockCorrupt(f"{value_bytes} bytes, expected {self.overhead_bytes + num_bytes}")
        codec = find(codec_id, codec_version)
        if codec is None:
            raise BlockForeign(f"in codec {codec_id}, version {codec_version}, which is not known here")
        fits = num_bytes == self._block_bytes if codec is RAW else num_bytes <= self._block_bytes
        if (dtype, *shape, fingerprint) != self._model or not fits:
            raise BlockForeign("of another model or layout")
        return Frame(codec, kind, tokens, first, num_bytes, checksum)

    def expect(self, header: bytes, fetch: Fetch, *, value_bytes: int) -> Frame:
        """Read a header as `read` does, and raise the same unless the payload is what `fetch` asks for."""
        frame = self.read(header, block=fetch.block, value_bytes=value_bytes)
        if frame.codec not in allowed(fetch.fidelity) or frame.fidelity_kind != fidelity_kind(fetch.fidelity):
            raise BlockForeign(f"in {frame.codec.name}, which does not keep what the block's name promises")
        if (frame.num_tokens, frame.first_position) != (fetch.num_tokens, fetch.first_position):
            raise BlockCorrupt(
                f"holds {frame.num_tokens} tokens from {frame.first_position} on, "
                f"expected {fetch.num_tokens} from {fetch.first_position} on"
            )
        return frame

    def body(self, header: bytes, fetch: Fetch, *, value_bytes: int) -> Body:
        """Judge a header as `expect` does, and say how the payload is to be received in the fetch's buffer."""
        frame = self.expect(header, fetch, value_bytes=value_bytes)
        target = fetch.into.cast("B")[: frame.num_bytes]
        if self._sealer is not None:
            opening = _opening(self._sealer, header, fetch.block, fetch.tenant)
            # The checksum that the payload is kept with from here on is computed where it is published.
            return Body(target, opening.open, TAG_BYTES, lambda tag: _opened(opening, tag, frame))
        checksum = xxhash.xxh3_64()

        def checked(_: bytes) -> Encoding:
            check_payload(checksum.intdigest(), frame.checksum)
            return Encoding(frame.codec, frame.num_bytes, frame.checksum)

        return Body(target, checksum.update, 0, checked)

    def whole(self, value: bytes, *, block: BlockHash) -> tuple[Frame, memoryview]:
        """Read a value of anybody's. Raises BlockCorrupt, BlockForeign."""
        header = value[: self.header_bytes]
        frame = self.read(header, block=block, value_bytes=len(value))
        payload = memoryview(value)[self.header_bytes :][: frame.num_bytes]
        if self._sealer is None:
            check_payload(xxhash.xxh3_64_intdigest(payload), frame.checksum)
            return frame, payload
        opening = _opening(self._sealer, header, block, None)
        content = memoryview(bytearray(payload))
        opening.open(content)
        _opened(opening, value[-TAG_BYTES:], frame)
        return frame, content.toreadonly()


class _Scratch(threading.local):
    """A buffer for each thread that seals: its pages are touched once, and a sealed value is sent before the next."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._buffer: memoryview | None = None

    @property
    def buffer(self) -> memoryview:
        if self._buffer is None:
            self._buffer = memoryview(bytearray(self._num_bytes))
        return self._buffer


def check_payload(found: int, expected: int) -> None:
    """Compare xxh3_64 checksums; raise BlockCorrupt when they differ."""
    if found != expected:
        raise BlockCorrupt(f"the payload's checksum is {found:016x}, expected {expected:016x}")


def _checksum_of(store: Store) -> int:
    return xxhash.xxh3_64_intdigest(store.payload) if store.checksum is None else store.checksum


def _opening(sealer: Sealer, header: bytes, block: BlockHash, tenant: str | None) -> Opening:
    try:
        return sealer.opening(header[HEADER_BYTES:], tenant=tenant, about=block + header[:HEADER_BYTES])
    except KeyUnknown as error:
        raise BlockForeign(f"sealed {error}") from error


def _opened(opening: Opening, tag: bytes, frame: Frame) -> Encoding:
    try:
        opening.finish(tag)
    except SealBroken as error:
        raise BlockCorrupt(str(error)) from error
    return Encoding(frame.codec, frame.num_bytes)


def _header_checksum(block: BlockHash, fields: bytes) -> int:
    return xxhash.xxh3_64_intdigest(block + fields)
