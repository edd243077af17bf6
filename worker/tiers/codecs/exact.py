"""The codecs that lose nothing: `raw` is the tensor's own bytes, `lossless` packs what repeats in them.

A floating-point number is mostly noise but for its exponent: a block's exponents lie close together (2.6 bits of 8).
`lossless` turns each number left by a bit, so that the sign joins the mantissa and the exponent fills the top byte, and
keeps the two apart: first all the lower bytes as they are, then all the top bytes, entropy coded. What does not shrink
is stored raw, and told by its length.
"""

import torch

from cache_store.codecs import LOSSLESS, RAW
from cache_store.errors import BlockCorrupt
from cache_store.layout import KVLayout
from worker.tiers.codecs.codec import as_bytes, beside_the_model, pieces
from worker.tiers.codecs.entropy import pack, unpack

_INTEGERS = {2: torch.int16, 4: torch.int32}


class RawCodec:
    """All of the block, filled or not."""

    info = RAW

    def __init__(self, layout: KVLayout, device: torch.device) -> None:
        self._layout, self._device = layout, device

    def encode(self, kv: torch.Tensor, into: memoryview, *, num_tokens: int, first_position: int) -> int:
        assert not into.readonly, "a copy would be written, and the payload lost"
        payload = self._as_block(into[: self._layout.block_bytes])
        with beside_the_model(self._device):
            for layers, heads in pieces(self._layout, self._device):
                payload[layers, :, heads].copy_(kv[layers, :, heads])
        return self._layout.block_bytes

    def decode(self, payload: memoryview, kv: torch.Tensor, *, num_tokens: int, first_position: int) -> None:
        if payload.nbytes != self._layout.block_bytes:
            raise BlockCorrupt(f"{payload.nbytes} bytes for a raw block of {self._layout.block_bytes}")
        block = self._as_block(payload)
        with beside_the_model(self._device):
            for layers, heads in pieces(self._layout, self._device):
                kv[layers, :, heads].copy_(block[layers, :, heads])

    def _as_block(self, buffer: memoryview) -> torch.Tensor:
        return as_bytes(buffer).view(getattr(torch, self._layout.dtype)).view(self._layout.block_shape)


class LosslessCodec:
    """Of an unfull block its tokens alone."""

    info = LOSSLESS

    def __init__(self, layout: KVLayout, device: torch.device) -> None:
        self._layout, self._device = layout, device
        self._raw = RawCodec(layout, device)
        self._integer = _INTEGERS[layout.itemsize]
        self._sign_bit = 8 * layout.itemsize - 1

    def encode(self, kv: torch.Tensor, into: memoryview, *, num_tokens: int, first_position: int) -> int:
        assert not into.readonly, "a copy would be written, and the payload lost"
        top, low = self._planes(num_tokens)
        with beside_the_model(self._device):
            for layers, heads in pieces(self._layout, self._device):
                bits = kv[layers, :, heads, :num_tokens].view(self._integer)
                turned = (bits << 1).sub_(bits >> self._sign_bit)  # an arithmetic shift: -1 for a negative number
                planes = turned.view(torch.uint8).unflatten(-1, (self._layout.head_dim, self._layout.itemsize))
                top[layers, :, heads].copy_(planes[..., -1])
                low[layers, :, heads].copy_(planes[..., :-1])
            packed = pack(top)
            num_bytes: int = low.numel() + len(packed)
            if num_bytes < self._layout.block_bytes:
                as_bytes(into[: low.numel()]).copy_(low.flatten())
                into[low.numel() : num_bytes] = packed
                return num_bytes
        return self._raw.encode(kv, into, num_tokens=num_tokens, first_position=first_position)

    def decode(self, payload: memoryview, kv: torch.Tensor, *, num_tokens: int, first_position: int) -> None:
        if payload.nbytes == self._layout.block_bytes:
            self._raw.decode(payload, kv, num_tokens=num_tokens, first_position=first_position)
            return
        top, low = self._opened(payload, num_tokens)
        with beside_the_model(self._device):
            top, low = top.to(self._device), low.to(self._device)
            for layers, heads in pieces(self._layout, self._device):
                target = kv[layers, :, heads, :num_tokens].view(self._integer)
                turned = torch.empty(target.shape, dtype=self._integer, device=self._device)
                planes = turned.view(torch.uint8).unflatten(-1, (self._layout.head_dim, self._layout.itemsize))
                planes[..., -1].copy_(top[layers, :, heads])
                planes[..., :-1].copy_(low[layers, :, heads])
                sign = turned << self._sign_bit
                target.copy_((turned >> 1).bitwise_and_((1 << self._sign_bit) - 1).bitwise_or_(sign))

    def _planes(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (*self._layout.block_shape[:3], num_tokens, self._layout.head_dim)
        top = torch.empty(shape, dtype=torch.uint8, device=self._device)
        return top, torch.empty((*shape, self._layout.itemsize - 1), dtype=torch.uint8, device=self._device)

    def _opened(self, payload: memoryview, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The planes that a payload holds, in the host's memory."""
        shape = (*self._layout.block_shape[:3], num_tokens, self._layout.head_dim)
        num_elements = self._layout.token_bytes // self._layout.itemsize * num_tokens
        low_bytes = num_elements * (self._layout.itemsize - 1)
        top = unpack(payload[low_bytes:], num_elements)
        low = as_bytes(payload[:low_bytes]).view(*shape, self._layout.itemsize - 1)
        return top.view(shape), low
