"""Where the parts of a quantized block lie: the same parts in the same order for every lossy codec.

header         8 bytes: whether keys were taken back to position 0, then nothing
sinks          [layers, heads, 2, tokens, head_dim] as the model wrote them: the conversation's first tokens
key_bases      [layers, heads] int16          value_bases   the same      (of the scales, see scales.py)
key_units      [layers, heads] int16          top half of a float32: what key_middles count in
key_scales     [layers, heads, groups, head_dim] uint8, a group being neighbouring tokens of one channel
key_middles    the same, int8
value_scales   [layers, heads, tokens, groups] uint8, a group being neighbouring numbers of one token
keys, values   [layers, heads, tokens, head_dim] int8, or half as many tokens of two nibbles
"""

import math
from dataclasses import dataclass

import torch

from cache_store.layout import KVLayout

SINK_TOKENS = 4
"""Of a conversation, kept as they are: attention leans on them, and their keys are unlike all others."""
HEADER_BYTES = 8

Parts = dict[str, torch.Tensor]
"""Views of a quantized block's bytes by name, all but the header."""

_MAX_KEY_GROUP = 64
_MAX_VALUE_GROUP = 64


@dataclass(frozen=True, slots=True)
class _Part:
    start: int
    end: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Form:
    """The parts of one codec's blocks for one layout."""

    def __init__(self, layout: KVLayout, *, nibble_keys: bool, nibble_values: bool, has_sinks: bool) -> None:
        layers, _, heads, tokens, dim = layout.block_shape
        self.key_group = math.gcd(tokens, _MAX_KEY_GROUP)
        self.value_group = max(size for size in range(1, min(dim, _MAX_VALUE_GROUP) + 1) if dim % size == 0)
        self.num_sinks = SINK_TOKENS if has_sinks else 0
        groups = (tokens // self.key_group, dim)
        self._parts: dict[str, _Part] = {}
        self.num_bytes = HEADER_BYTES
        for name, dtype, shape in (
            ("sinks", getattr(torch, layout.dtype), (2, self.num_sinks, dim)),
            ("key_bases", torch.int16, ()),
            ("value_bases", torch.int16, ()),
            ("key_units", torch.int16, ()),
            ("key_scales", torch.uint8, groups),
            ("key_middles", torch.int8, groups),
            ("value_scales", torch.uint8, (tokens, dim // self.value_group)),
            ("keys", torch.int8, (tokens // 2 if nibble_keys else tokens, dim)),
            ("values", torch.int8, (tokens // 2 if nibble_values else tokens, dim)),
        ):
            start = self.num_bytes
            self.num_bytes += layers * heads * math.prod(shape) * dtype.itemsize
            self._parts[name] = _Part(start, self.num_bytes, (layers, heads, *shape), dtype)

    def open(self, plain: torch.Tensor) -> Parts:
        """The parts of `plain`, a contiguous tensor of `num_bytes` uint8."""
        return {
            name: plain[part.start : part.end].view(part.dtype).view(part.shape) for name, part in self._parts.items()
        }
