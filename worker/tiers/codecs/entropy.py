"""Entropy coding of bytes whose values are unevenly frequent: on the host, by zstd, which lets go of the GIL."""

from typing import Final

import torch
import zstandard

from cache_store.errors import BlockCorrupt
from worker.tiers.codecs.codec import as_bytes

_HUFFMAN: Final = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6, window_log=17
)
"""zstd that hardly looks for repetitions: KV has none, and the few that it finds by chance cost speed and bits. On
exponents of normally distributed bfloat16: 2.68 bits each (the entropy is 2.63) at 1.8 GB/s of KV; zstd's level 1 took
2.93 bits at 0.65 GB/s."""


def pack(plain: torch.Tensor) -> bytes:
    """Code a contiguous tensor of uint8, on any device."""
    return zstandard.ZstdCompressor(compression_params=_HUFFMAN).compress(plain.cpu().numpy())


def unpack(packed: memoryview, num_bytes: int) -> torch.Tensor:
    """What was packed, in host memory. Raises BlockCorrupt unless it is `num_bytes` long."""
    try:
        plain = zstandard.ZstdDecompressor().decompress(packed, max_output_size=num_bytes)
    except zstandard.ZstdError as error:
        raise BlockCorrupt(f"a payload can't be unpacked: {error}") from error
    if len(plain) != num_bytes:
        raise BlockCorrupt(f"a payload unpacks to {len(plain)} bytes, expected {num_bytes}")
    return as_bytes(memoryview(plain))
