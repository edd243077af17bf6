"""The lossy codecs: int8, and k8v4 and int4, which keep the upper nibbles of its codes.

Keys are quantized per channel over up to 64 tokens, around the middle of their range, after RoPE was undone: channels
differ in size and offset, tokens hardly. Values are quantized per token over up to 64 channels, around zero. The parts
(form.py) are entropy coded as one: most codes are small. A smaller codec's payload is made from a larger one's alone,
and is what the original would have given.

int8 is off by at most half of its scale, a nibble by 8 times its scale (before RoPE is applied again, and before
rounding to the model's dtype). A block with numbers that have no place on such a scale (NaN, infinity, near the dtype's
limit) is stored raw, and told by its length.
"""

import torch

from cache_store.codecs import INT4, INT8, K8V4, CodecInfo
from cache_store.errors import BlockForeign
from cache_store.layout import KVLayout
from worker.tiers.codecs.codec import beside_the_model, pieces
from worker.tiers.codecs.dequantize import Dequantizer
from worker.tiers.codecs.entropy import pack, unpack
from worker.tiers.codecs.exact import RawCodec
from worker.tiers.codecs.form import HEADER_BYTES, Form, Parts
from worker.tiers.codecs.rope import Rope, Turn
from worker.tiers.codecs.scales import pack_scales, unpack_scales

_LEVELS = 127
"""Codes are in [-127, 127]."""
_UPPER = -16
"""Mask of a code's upper nibble."""
_NIBBLE_MIDDLE = 7.5
"""Of the 16 codes that share an upper nibble, counted from the lowest."""
_UNTURNED = 1
_NIBBLES = {INT8: (False, False), K8V4: (False, True), INT4: (True, True)}


class QuantizedCodec:
    """Codes full blocks only: no token is encoded twice."""

    def __init__(
        self,
        info: CodecInfo,
        layout: KVLayout,
        rope: Rope | None,
        device: torch.device,
        dequantizer: Dequantizer | None = None,
    ) -> None:
        """`rope` is None where the model's keys can't be taken back to position 0: they are coded as they are.
        `dequantizer` decodes what it serves."""
        assert info in _NIBBLES
        self.info = info
        self._layout, self._rope, self._device = layout, rope, device
        self._raw = RawCodec(layout, device)
        self._dequantizer = dequantizer
        keys, values = _NIBBLES[info]
        self._later, self._first = (
            Form(layout, nibble_keys=keys, nibble_values=values, has_sinks=has_sinks) for has_sinks in (False, True)
        )
        self._max_magnitude = torch.finfo(getattr(torch, layout.dtype)).max / 4

    def encode(self, kv: torch.Tensor, into: memoryview, *, num_tokens: int, first_position: int) -> int:
        assert num_tokens == self._layout.block_tokens, "unfull blocks are stored exactly"
        form = self.form(first_position)
        with beside_the_model(self._device):
            plain = torch.zeros(form.num_bytes, dtype=torch.uint8, device=self._device)
            turn = self._turn(first_position)
            plain[0] = _UNTURNED if turn else 0
            largest = self._quantize(kv, form, form.open(plain), turn)
            if bool(largest <= self._max_magnitude):  # not if it is NaN
                packed = pack(plain)
                if len(packed) < self._layout.block_bytes:
                    into[: len(packed)] = packed
                    return len(packed)
        return self._raw.encode(kv, into, num_tokens=num_tokens, first_position=first_position)

    def _quantize(self, kv: torch.Tensor, form: Form, parts: Parts, turn: Turn | None) -> torch.Tensor:
        """Fill the parts. Returns the block's largest magnitude."""
        largest = torch.zeros((), device=self._device)
        for layers, heads in pieces(self._layout, self._device):
            piece = {name: part[layers, heads] for name, part in parts.items()}
            keys, values = (_to_float(kv[layers, which, heads], piece["sinks"][:, :, which]) for which in (0, 1))
            largest = torch.maximum(largest, _encode_keys(keys, piece, turn, form.key_group))
            largest = torch.maximum(largest, _encode_values(values, piece, form.value_group))
        return largest

    def decode(self, payload: memoryview, kv: torch.Tensor, *, num_tokens: int, first_position: int) -> None:
        if payload.nbytes == self._layout.block_bytes:
            self._raw.decode(payload, kv, num_tokens=num_tokens, first_position=first_position)
            return
        form = self.form(first_position)
        plain = unpack(payload, form.num_bytes)
        if plain[0] > _UNTURNED or (plain[0] and self._rope is None):
            raise BlockForeign("keys were taken back to position 0 in a way that is not known here")
        turn = self._turn(first_position) if plain[0] else None
        if self._dequantizer is not None and self._dequantizer.serves(kv):
            self._dequantizer.decode(form.open(plain), form, turn, kv)
            return
        with beside_the_model(self._device):
            parts = form.open(plain.to(self._device))
            for layers, heads in pieces(self._layout, self._device):
                piece = {name: part[layers, heads] for name, part in parts.items()}
                for which, numbers in enumerate((_decode_keys(piece, turn), _decode_values(piece))):
                    kv[layers, which, heads].copy_(numbers)
                    kv[layers, which, heads, : form.num_sinks].copy_(piece["sinks"][:, :, which])

    def form(self, first_position: int) -> Form:
        """Of the block that starts there."""
        return self._later if first_position else self._first

    def _turn(self, first_position: int) -> Turn | None:
        if self._rope is None:
            return None
        return self._rope.turn(first_position, self._layout.block_tokens, self._device)


def shrink(payload: memoryview, source: Form, target: Form, into: memoryview) -> int:
    """Write what `target` makes of a payload of `source` (not raw) to the front of `into`; return its length in bytes.

    Works on host memory. Raises BlockCorrupt for what no codec has written.
    """
    old = unpack(payload, source.num_bytes)
    new = torch.empty(target.num_bytes, dtype=torch.uint8)
    with beside_the_model(old.device):
        new[:HEADER_BYTES] = old[:HEADER_BYTES]
        parts = target.open(new)
        for name, part in source.open(old).items():
            _write_codes(part, parts[name])
        packed = pack(new)
    into[: len(packed)] = packed
    return len(packed)


def _to_float(numbers: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """A float32 copy; the first tokens are also put aside."""
    sinks.copy_(numbers[:, :, : sinks.shape[2]])
    return numbers.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _stand_in(numbers: torch.Tensor, piece: Parts) -> None:
    """Let the token after those put aside stand in for them, so that no scale reaches for them."""
    num_sinks = piece["sinks"].shape[3]
    numbers[:, :, :num_sinks] = numbers[:, :, num_sinks : num_sinks + 1]


def _encode_keys(keys: torch.Tensor, piece: Parts, turn: Turn | None, group: int) -> torch.Tensor:
    """Returns the largest magnitude."""
    if turn:
        turn.undo(keys)
    _stand_in(keys, piece)
    groups = keys.unflatten(2, (-1, group))
    low, high = torch.aminmax(groups, dim=3)
    middles = _encode_middles((low + high).mul_(0.5), piece)
    codes, bases = pack_scales(torch.maximum(high - middles, middles - low).div_(_LEVELS))
    piece["key_scales"].copy_(codes)
    piece["key_bases"].copy_(bases)
    scales = unpack_scales(codes, bases)
    groups.sub_(middles[:, :, :, None]).div_(scales[:, :, :, None]).round_()
    _write_codes(keys.to(torch.int8), piece["keys"])
    return torch.maximum(high, -low).amax()


def _encode_middles(wanted: torch.Tensor, piece: Parts) -> torch.Tensor:
    """Returns what the middles of the channels' ranges became."""
    largest = wanted.abs().flatten(2).amax(2).div_(_LEVELS)
    units = ((largest.view(torch.int32) + 0xFFFF) >> 16).clamp_(min=0x80)  # rounded up; a normal number
    piece["key_units"].copy_(units)
    piece["key_middles"].copy_(wanted.div_(_unit(piece)).round_())
    return _middles(piece)


def _unit(piece: Parts) -> torch.Tensor:
    return (piece["key_units"].to(torch.int32) << 16).view(torch.float32)[:, :, None, None]


def _middles(piece: Parts) -> torch.Tensor:
    return piece["key_middles"].to(torch.float32).mul_(_unit(piece))


def _encode_values(values: torch.Tensor, piece: Parts, group: int) -> torch.Tensor:
    """Returns the largest magnitude."""
    _stand_in(values, piece)
    groups = values.unflatten(3, (-1, group))
    largest = groups.abs().amax(4)
    codes, bases = pack_scales(largest / _LEVELS)
    piece["value_scales"].copy_(codes)
    piece["value_bases"].copy_(bases)
    groups.div_(unpack_scales(codes, bases)[..., None]).round_()
    _write_codes(values.to(torch.int8), piece["values"])
    return largest.amax()


def _decode_keys(piece: Parts, turn: Turn | None) -> torch.Tensor:
    scales = unpack_scales(piece["key_scales"], piece["key_bases"])
    keys = _read_codes(piece["keys"], _num_tokens(piece))
    keys.unflatten(2, (scales.shape[2], -1)).mul_(scales[:, :, :, None]).add_(_middles(piece)[:, :, :, None])
    if turn:
        turn.apply(keys)
    return keys


def _decode_values(piece: Parts) -> torch.Tensor:
    scales = unpack_scales(piece["value_scales"], piece["value_bases"])
    values = _read_codes(piece["values"], _num_tokens(piece))
    values.unflatten(3, (scales.shape[3], -1)).mul_(scales[..., None])
    return values


def _num_tokens(piece: Parts) -> int:
    num_tokens: int = piece["value_scales"].shape[2]
    return num_tokens


def _write_codes(codes: torch.Tensor, part: torch.Tensor) -> None:
    """As they are, or the upper nibbles of the first half of the tokens below those of the second half."""
    if codes.shape == part.shape:
        part.copy_(codes)
    else:
        lower, upper = codes.chunk(2, 2)
        part.copy_((lower >> 4).bitwise_and_(15).bitwise_or_(upper & _UPPER))


def _read_codes(part: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """As float32; of a nibble the middle of the codes that share it."""
    if part.shape[2] == num_tokens:
        return part.to(torch.float32)
    return torch.cat((part << 4, part & _UPPER), 2).to(torch.float32).add_(_NIBBLE_MIDDLE)
