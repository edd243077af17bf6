"""What a codec is, and what all of them share: work in pieces beside the model, and payloads as tensors.

Knows no codec, and of a block no more than its shape.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

import torch

from cache_store.codecs import CodecInfo
from cache_store.layout import KVLayout

assert sys.byteorder == "little", "payloads hold numbers as the machine does"

_PIECE_ELEMENTS: Final = 131_072
"""Of a CPU's work at a time: it stays in a core's cache from one operation to the next."""

_set_openmp_threads: Final = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
"""Of the OpenMP that torch has loaded, for the calling thread alone (torch.set_num_threads is for all of them)."""

Piece = tuple[slice, slice]
"""Some layers and some KV heads."""


class Codec(Protocol):
    """One way to write a block. Any thread may call, on different blocks."""

    @property
    def info(self) -> CodecInfo: ...

    def encode(self, kv: torch.Tensor, into: memoryview, *, num_tokens: int, first_position: int) -> int:
        """Write a block's payload to the front of `into` (layout.block_bytes), and return its length in bytes.

        `kv` is [layers, 2, kv_heads, block_tokens, head_dim], any view of the pool, of which the first `num_tokens`
        count. `first_position` is the first one's index in the conversation. Equal blocks give equal payloads.
        """

    def decode(self, payload: memoryview, kv: torch.Tensor, *, num_tokens: int, first_position: int) -> None:
        """Write the first `num_tokens` tokens of such a view; what lies past them has no meaning afterwards.

        On return the model may attend to it. Raises BlockCorrupt or BlockForeign for what `encode` does not write.
        """


def pieces(layout: KVLayout, device: torch.device) -> Iterator[Piece]:
    """Cut layers and heads so that a CPU works in its cache; on an accelerator there is one piece."""
    layers, heads = layout.num_layers, layout.num_kv_heads
    rows = layers * heads
    if device.type == "cpu":
        rows = max(1, _PIECE_ELEMENTS // (2 * layout.block_tokens * layout.head_dim))
    layers_at_once, heads_at_once = max(1, rows // heads), min(rows, heads)
    for layer in range(0, layers, layers_at_once):
        for head in range(0, heads, heads_at_once):
            yield slice(layer, layer + layers_at_once), slice(head, head + heads_at_once)


@contextmanager
def beside_the_model(device: torch.device) -> Iterator[None]:
    """Keep out of the model's way: on a CPU by waking none of the threads that it shares with all of torch, on an
    accelerator by a stream of its own, which starts after what the model's had been given and is done on leaving."""
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.default_stream(device))
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()
    elif _set_openmp_threads is None:
        yield
    else:
        before = torch.get_num_threads()
        _set_openmp_threads(1)
        try:
            yield
        finally:
            _set_openmp_threads(before)


def as_bytes(buffer: memoryview) -> torch.Tensor:
    """A host buffer as a tensor of uint8: the same memory, unless it is read-only, which torch does not know."""
    return torch.frombuffer(bytearray(buffer) if buffer.readonly else buffer, dtype=torch.uint8)
