"""Blocks on their way down a ladder: from the payload of one codec to that of a smaller one, in host memory.

Knows which of two ways that is. From an exact payload it is decoding and encoding; a lossy one is never decoded for it,
so that what comes out is what the original would have given.
"""

from collections.abc import Mapping

import torch

from cache_store.codecs import CodecInfo
from cache_store.layout import KVLayout
from cache_store.store import Held
from worker.tiers.codecs.codec import Codec
from worker.tiers.codecs.quantized import QuantizedCodec, shrink


class Shrinker:
    """`worker.tiers.ageing.Shrink`, for full blocks, on one thread at a time."""

    def __init__(self, layout: KVLayout, codecs: Mapping[str, Codec]) -> None:
        """`codecs` by name, all of them, on the CPU."""
        self._layout = layout
        self._codecs = codecs
        self._kv = torch.empty(layout.block_shape, dtype=getattr(torch, layout.dtype))

    def __call__(self, held: Held, target: CodecInfo) -> memoryview:
        """The payload in `target`. Raises BlockCorrupt or BlockForeign for one that `held.codec` did not write."""
        old, new = self._codecs[held.codec.name], self._codecs[target.name]
        into = memoryview(bytearray(self._layout.block_bytes))
        where = {"num_tokens": held.num_tokens, "first_position": held.first_position}
        if not held.codec.lossy:
            old.decode(held.payload, self._kv, **where)
            return into[: new.encode(self._kv, into, **where)]
        assert isinstance(old, QuantizedCodec)
        assert isinstance(new, QuantizedCodec)
        if held.payload.nbytes == self._layout.block_bytes:
            return held.payload  # it has no place on a scale, and is raw in all of them
        return into[: shrink(held.payload, old.form(held.first_position), new.form(held.first_position), into)]
