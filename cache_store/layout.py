"""The shape of one KV block, and every number that follows from it."""

from dataclasses import dataclass

MIN_BLOCK_TOKENS = 16
MAX_BLOCK_TOKENS = 256
TARGET_BLOCK_BYTES = 2 * 1024 * 1024
"""Redis moves values of 0.5 to 4 MiB fastest; at 8 MiB and above it falls off (DESIGN, section 4)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """[layers, 2 (key, value), kv_heads, block_tokens, head_dim] of `dtype`, contiguous: the payload of a block."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: str
    """torch's name: "float32", "bfloat16" or "float16"."""

    @property
    def itemsize(self) -> int:
        return {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]

    @property
    def token_bytes(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.itemsize

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_tokens

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, 2, self.num_kv_heads, self.block_tokens, self.head_dim)


def choose_block_tokens(token_bytes: int) -> int:
    """The largest power of two in [16, 256] whose block stays within `TARGET_BLOCK_BYTES`."""
    tokens = MAX_BLOCK_TOKENS
    while tokens > MIN_BLOCK_TOKENS and tokens * token_bytes > TARGET_BLOCK_BYTES:
        tokens //= 2
    return tokens
