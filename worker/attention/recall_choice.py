"""Which pieces of what has left the window queries ask for: representatives, and shares of an attention over them.

Without training, after InfLLM (Xiao et al. 2024): a piece is known by a few representatives a layer and KV head, all
queries and keys as they are before their positions. Each KV head has a choice of its own: in a small model a single
head of a single layer may be the one that looks facts up.

Both sides are rounded to int8, so that a product is exact in any order of its sums, and representatives are an eighth
of the KV they stand for where that is in 16 bits.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

REPRESENTED_TOKENS = 2
"""So many keys that follow each other are represented by their mean."""
LARGEST = 127
"""Number of a vector that is rounded to int8."""

Shares = npt.NDArray[np.float32]
Looking = npt.NDArray[np.bool_]
"""[layers, kv_heads]: who looks at all."""


class Represented:
    """Some units that follow each other, on the CPU."""

    __slots__ = ("addresses", "keys", "nbytes", "num_units", "scales")

    def __init__(self, keys: torch.Tensor, scales: torch.Tensor) -> None:
        """`keys` int8 [layers, kv_heads, units, representatives, head_dim], `scales` float32 [layers, kv_heads, units],
        both contiguous."""
        assert keys.is_contiguous()
        assert scales.is_contiguous()
        self.keys = keys
        self.scales = scales
        self.num_units: int = keys.shape[2]
        self.nbytes: int = keys.nbytes + scales.nbytes
        self.addresses: tuple[int, int] = keys.data_ptr(), scales.data_ptr()


class Known:
    """All units that may be recalled, in parts as they became known."""

    def __init__(self) -> None:
        self.parts: list[Represented] = []
        self.num_units = 0
        self._rows: list[tuple[int, int, int, int]] = []
        self._table: npt.NDArray[np.int64] | None = None

    def add(self, part: Represented) -> None:
        self.parts.append(part)
        self._rows.append((*part.addresses, part.num_units, self.num_units))
        self._table = None
        self.num_units += part.num_units

    @property
    def table(self) -> npt.NDArray[np.int64]:
        """[parts, 4]: where a part's keys and scales lie, its number of units, and that of all before it."""
        if self._table is None:
            self._table = np.array(self._rows, dtype=np.int64)
        return self._table


class Look(Protocol):
    """As `shares`."""

    def __call__(self, queries: torch.Tensor, known: Known, looking: Looking | None = None) -> Shares: ...


def represent(keys: torch.Tensor, unit_tokens: int) -> Represented:
    """Represent the units of keys before their positions, [layers, kv_heads, tokens, head_dim]."""
    layers, kv_heads, num_tokens, head_dim = keys.shape
    each = min(REPRESENTED_TOKENS, unit_tokens)
    means = keys.float().view(layers, kv_heads, num_tokens // unit_tokens, unit_tokens // each, each, head_dim).mean(4)
    rounded, scales = _rounded(means.flatten(3))
    return Represented(rounded.view_as(means).cpu(), scales.cpu())


def round_queries(queries: torch.Tensor, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [layers, rows, heads, head_dim] to int8 [layers, kv_heads, rows * heads of each, head_dim], and what
    products with them are to be scaled by, float32 [layers, kv_heads, rows * heads of each]."""
    layers, rows, heads, head_dim = queries.shape
    grouped = queries.view(layers, rows, kv_heads, heads // kv_heads, head_dim).transpose(1, 2).flatten(2, 3)
    rounded, scales = _rounded(grouped.float())
    return rounded, scales * head_dim**-0.5


def shares(queries: torch.Tensor, known: Known, looking: Looking | None = None) -> Shares:
    """How much each unit is asked for by queries [layers, rows, heads, head_dim]: [layers, kv_heads, units].

    A query's share for a unit is the unit's part in a softmax over all units, each as near as its nearest
    representative. Of a KV head's queries, and of all rows, the largest counts. A head that is not `looking` asks for
    nothing; None: all are.
    """
    keys = torch.cat([part.keys for part in known.parts], 2)
    scales = torch.cat([part.scales for part in known.parts], 2)
    layers, kv_heads, units, each, _ = keys.shape
    rounded, query_scales = round_queries(queries, kv_heads)
    # In float32, which has room for all products of up to a thousand whole numbers.
    sums = torch.matmul(rounded.float(), keys.flatten(2, 3).transpose(2, 3).float())
    nearest = sums.view(layers, kv_heads, -1, units, each).amax(-1) * scales[:, :, None] * query_scales[..., None]
    found: Shares = torch.softmax(nearest, -1).amax(2).numpy()
    return found if looking is None else found * looking[..., None]


def _rounded(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., n] to int8, each by a scale of its own: [...]."""
    scales = vectors.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
    return (vectors / scales[..., None]).round().to(torch.int8), scales
