"""One KV block as one self-describing value: 64 bytes of header, then the payload.

Knows bytes and checksums. Knows no store. The header is checked before a byte of payload is believed, and its checksum
covers the payload's: nothing of a value can change unseen. It also covers the block's name, which the value does not
carry, so that a whole value under the wrong name is refused too.
"""

import hashlib
import struct

import xxhash

from cache_store.errors import BlockCorrupt, BlockForeign
from cache_store.ids import BlockHash
from cache_store.layout import KVLayout

HEADER_BYTES = 64

_FIELDS = struct.Struct("<4sHBB5H2xI16sQ8x")
"""magic, version, codec, dtype; layers, kv heads, head dim, block tokens, tokens; payload bytes, fingerprint, payload's
xxh3_64; 8 bytes to spare. The header's own xxh3_64 follows."""
_CHECKSUM = struct.Struct("<Q")
_MAGIC = b"RKV\x01"
_VERSION = 1
_RAW = 0
"""The codec: the payload is the tensor's own bytes."""
_DTYPES = {"float32": 1, "bfloat16": 2, "float16": 3}


class Framer:
    """Writes and judges the headers of one model's blocks."""

    def __init__(self, layout: KVLayout, fingerprint: bytes) -> None:
        self.payload_bytes = layout.block_bytes
        self.value_bytes = HEADER_BYTES + layout.block_bytes
        shape = (layout.num_layers, layout.num_kv_heads, layout.head_dim, layout.block_tokens)
        self._model = (_RAW, _DTYPES[layout.dtype], *shape, hashlib.blake2b(fingerprint, digest_size=16).digest())

    def header(self, block: BlockHash, num_tokens: int, payload: memoryview) -> bytes:
        """The 64 bytes that go before `payload`: all of the block, filled or not."""
        assert payload.nbytes == self.payload_bytes, f"{payload.nbytes} bytes for a block of {self.payload_bytes}"
        codec, dtype, *shape, fingerprint = self._model
        checksum = xxhash.xxh3_64_intdigest(payload)
        fields = _FIELDS.pack(
            _MAGIC, _VERSION, codec, dtype, *shape, num_tokens, self.payload_bytes, fingerprint, checksum
        )
        return fields + _CHECKSUM.pack(_header_checksum(block, fields))

    def expect(self, header: bytes, *, block: BlockHash, num_tokens: int, value_bytes: int) -> int:
        """Return the checksum that the payload must have, or raise BlockCorrupt or BlockForeign.

        `header` is the value's first 64 bytes (all of it where it is shorter) and `value_bytes` its whole length.
        """
        if len(header) < HEADER_BYTES:
            raise BlockCorrupt(f"{len(header)} bytes are no header")
        magic, version, codec, dtype, *shape, tokens, length, fingerprint, checksum = _FIELDS.unpack_from(header)
        if magic != _MAGIC:
            raise BlockCorrupt(f"magic {magic!r}, expected {_MAGIC!r}")
        if version != _VERSION:
            raise BlockForeign(f"written as version {version}, expected {_VERSION}")
        if _CHECKSUM.unpack_from(header, _FIELDS.size) != (_header_checksum(block, header[: _FIELDS.size]),):
            raise BlockCorrupt("the header's checksum is wrong")
        if value_bytes != HEADER_BYTES + length:
            raise BlockCorrupt(f"{value_bytes} bytes, expected {HEADER_BYTES + length}")
        if (codec, dtype, *shape, fingerprint) != self._model or length != self.payload_bytes:
            raise BlockForeign("of another model, layout or codec")
        if tokens != num_tokens:
            raise BlockCorrupt(f"holds {tokens} tokens, expected {num_tokens}")
        return int(checksum)


def check_payload(found: int, expected: int) -> None:
    """Compare xxh3_64 checksums; raise BlockCorrupt when they differ."""
    if found != expected:
        raise BlockCorrupt(f"the payload's checksum is {found:016x}, expected {expected:016x}")


def _header_checksum(block: BlockHash, fields: bytes) -> int:
    return xxhash.xxh3_64_intdigest(block + fields)
