"""One KV block as one self-describing value: 64 bytes of header, then the payload as its codec wrote it.

Knows bytes and checksums. Knows no store. The header is checked before a byte of payload is believed, and its checksum
covers the payload's: nothing of a value can change unseen. It also covers the block's name, which the value does not
carry, so that a whole value under the wrong name is refused too.
"""

import hashlib
import struct
from typing import NamedTuple

import xxhash

from cache_store.codecs import RAW, CodecInfo, allowed, fidelity_kind, find
from cache_store.errors import BlockCorrupt, BlockForeign
from cache_store.ids import BlockHash
from cache_store.layout import KVLayout
from cache_store.store import Fetch, Store

HEADER_BYTES = 64

_FIELDS = struct.Struct("<4sHBB5HBBI16sQI4x")
"""magic, version, codec, dtype; layers, kv heads, head dim, block tokens, tokens; codec's version, fidelity kind;
payload bytes, fingerprint, payload's xxh3_64, first position; 4 bytes to spare. The header's own xxh3_64 follows."""
_CHECKSUM = struct.Struct("<Q")
_MAGIC = b"RKV\x01"
_VERSION = 2
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
    """The payload's xxh3_64."""


def model_digest(fingerprint: bytes) -> bytes:
    """16 bytes of a fingerprint: what tells a model's blocks from others where they are kept."""
    return hashlib.blake2b(fingerprint, digest_size=16).digest()


class Framer:
    """Writes and judges the headers of one model's blocks."""

    def __init__(self, layout: KVLayout, fingerprint: bytes) -> None:
        self.model = model_digest(fingerprint)
        self._block_bytes = layout.block_bytes
        shape = (layout.num_layers, layout.num_kv_heads, layout.head_dim, layout.block_tokens)
        self._model = (_DTYPES[layout.dtype], *shape, self.model)

    def header(self, store: Store) -> bytes:
        """The 64 bytes that go before `store.payload`: all of the block, filled or not."""
        num_bytes, codec = store.payload.nbytes, store.codec
        assert num_bytes <= self._block_bytes, f"{num_bytes} bytes for a block of {self._block_bytes}"
        assert codec is not RAW or num_bytes == self._block_bytes, f"{num_bytes} raw bytes of {self._block_bytes}"
        dtype, *shape, fingerprint = self._model
        fields = _FIELDS.pack(
            _MAGIC,
            _VERSION,
            codec.id,
            dtype,
            *shape,
            store.num_tokens,
            codec.version,
            fidelity_kind(store.fidelity),
            num_bytes,
            fingerprint,
            xxhash.xxh3_64_intdigest(store.payload) if store.checksum is None else store.checksum,
            store.first_position,
        )
        return fields + _CHECKSUM.pack(_header_checksum(store.block, fields))

    def read(self, header: bytes, *, block: BlockHash, value_bytes: int) -> Frame:
        """Read a header, or raise BlockCorrupt, or BlockForeign for what is whole and not for us to read.

        `header` is the value's first 64 bytes (all of it where it is shorter) and `value_bytes` its whole length.
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
        if version != _VERSION:
            raise BlockForeign(f"written as version {version}, expected {_VERSION}")
        if _CHECKSUM.unpack_from(header, _FIELDS.size) != (_header_checksum(block, header[: _FIELDS.size]),):
            raise BlockCorrupt("the header's checksum is wrong")
        if value_bytes != HEADER_BYTES + num_bytes:
            raise BlockCorrupt(f"{value_bytes} bytes, expected {HEADER_BYTES + num_bytes}")
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


def check_payload(found: int, expected: int) -> None:
    """Compare xxh3_64 checksums; raise BlockCorrupt when they differ."""
    if found != expected:
        raise BlockCorrupt(f"the payload's checksum is {found:016x}, expected {expected:016x}")


def _header_checksum(block: BlockHash, fields: bytes) -> int:
    return xxhash.xxh3_64_intdigest(block + fields)
