"""Scales as single bytes: the top bits of a float32, less a base that a layer's head shares.

A positive float32 read as an integer is its logarithm, roughly; its bits from the 19th on are exponent and four bits of
mantissa. A byte of them, counted from the largest of a head, spans 16 octaves in steps of 3 to 6%. Integers all the
way, so that every device comes to the same bytes.
"""

import torch

_SHIFT = 19
_LAST_CODE = 255
_SMALLEST_BASE = 16
"""Of normal numbers."""


def pack_scales(wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and bases of the smallest scales that are no less than `wanted` [layers, heads, ...], float32, 0 or more.

    Returns uint8 codes of that shape, and int16 bases [layers, heads].
    """
    rounded_up = (wanted.view(torch.int32) + ((1 << _SHIFT) - 1)) >> _SHIFT
    bases = rounded_up.flatten(2).amax(2).sub_(_LAST_CODE).clamp_(min=_SMALLEST_BASE)
    codes = rounded_up.sub_(_over(bases, rounded_up)).clamp_(min=0, max=_LAST_CODE)
    return codes.to(torch.uint8), bases.to(torch.int16)


def unpack_scales(codes: torch.Tensor, bases: torch.Tensor) -> torch.Tensor:
    """The scales, float32, all positive, of what `pack_scales` gave."""
    bits = codes.to(torch.int32).add_(_over(bases, codes)).bitwise_left_shift_(_SHIFT)
    return bits.view(torch.float32)


def _over(per_head: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return per_head.view(*per_head.shape, *[1] * (others.dim() - 2))
