"""A model's rotary positions: keys taken back to what they were before them, and forth.

Knows rotations that turn the two halves of a key's first numbers against each other by a fixed angle per position
(llama's way, for one frequency per pair), whatever made the frequencies. Others are not known here: see `rope_of`.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, slots=True)
class Turn:
    """The rotation of each token of a block: cosines and sines [block_tokens, pairs], float32."""

    cos: torch.Tensor
    sin: torch.Tensor

    def apply(self, keys: torch.Tensor) -> None:
        """Turn float32 keys [..., block_tokens, head_dim] to their positions, in place."""
        self._turn(keys, self.sin)

    def undo(self, keys: torch.Tensor) -> None:
        """Turn such keys back to position 0, in place."""
        self._turn(keys, -self.sin)

    def _turn(self, keys: torch.Tensor, sin: torch.Tensor) -> None:
        # One operation at a time: nothing is fused, so that every device rounds alike.
        pairs = self.cos.shape[1]
        first, second = keys[..., :pairs], keys[..., pairs : 2 * pairs]
        across = first * sin
        first.mul_(self.cos).sub_(second * sin)
        second.mul_(self.cos).add_(across)


class Rope:
    """One rotation for all layers and heads."""

    def __init__(self, frequencies: npt.NDArray[np.float64]) -> None:
        """`frequencies` [pairs]: radians per position. A head's numbers past the 2 * pairs first are left alone."""
        self._frequencies = frequencies

    @property
    def num_pairs(self) -> int:
        return len(self._frequencies)

    def turn(self, first_position: int, num_tokens: int, device: torch.device) -> Turn:
        """The rotation of `num_tokens` tokens from a position on. Made on the CPU: equal on every device."""
        return self.turns(np.arange(first_position, first_position + num_tokens), device)

    def turns(self, positions: npt.NDArray[np.int64], device: torch.device) -> Turn:
        """The rotations of these positions, or by these distances (which may be negative)."""
        angles = np.outer(positions.astype(np.float64), self._frequencies)
        cos, sin = (torch.from_numpy(table.astype(np.float32)).to(device) for table in (np.cos(angles), np.sin(angles)))
        return Turn(cos, sin)
