"""Copies KV within the device's pool to other positions: values as they are, keys turned in float32 and rounded once.

Exact where a model turns its keys by llama's rotary positions (Su et al. 2021): those of positions p and q differ by
the rotation of q - p, whatever they hold. See `worker/tiers/codecs/rope_of.py` for how that is found out.
"""

import numpy as np
import numpy.typing as npt
import torch

from worker.tiers.codecs.rope import Rope

_Ints = npt.NDArray[np.int64]


class Placer:
    """Used by the engine's thread."""

    def __init__(self, pool: torch.Tensor, rope: Rope) -> None:
        """`pool` is KVCache.data: [layers, 2, kv_heads, slots, head_dim]."""
        self._pool = pool
        self._rope = rope

    def place(self, source: _Ints, target: _Ints, by: int) -> None:
        """Copy the KV in slots `source` to `target` (both [tokens]), of all layers, `by` so many positions on.

        No slot may be in both.
        """
        take, put = (torch.from_numpy(slots).to(self._pool.device) for slots in (source, target))
        turn = self._rope.turns(np.array([by]), self._pool.device)
        for keys, values in self._pool:
            turned = keys.index_select(1, take).float()
            turn.apply(turned)
            keys.index_copy_(1, put, turned.to(keys.dtype))
            values.index_copy_(1, put, values.index_select(1, take))

    def place_each(self, layers: _Ints, heads: _Ints, source: _Ints, target: _Ints, by: _Ints) -> None:
        """As `place`, of one KV head of one layer each; all are [tokens]."""
        _, _, kv_heads, slots, head_dim = self._pool.shape
        rows = self._pool.view(-1, head_dim)
        first = (layers * 2 * kv_heads + heads) * slots
        take, put = (torch.from_numpy(first + at).to(rows.device) for at in (source, target))
        turned = rows.index_select(0, take).float()
        self._rope.turns(by, rows.device).apply(turned)
        rows.index_copy_(0, put, turned.to(rows.dtype))
        to_values = kv_heads * slots
        rows.index_copy_(0, put + to_values, rows.index_select(0, take + to_values))

    def unturned(self, slots: _Ints, places: _Ints) -> torch.Tensor:
        """Keys of slots that stand at `places`, as they were before their positions, in float32:
        [layers, kv_heads, tokens, head_dim]."""
        take = torch.from_numpy(slots).to(self._pool.device)
        keys = self._pool[:, 0].index_select(2, take).float()
        self._rope.turns(places, self._pool.device).undo(keys)
        return keys

    def undo(self, queries: torch.Tensor, first_place: int) -> torch.Tensor:
        """Queries [..., rows, head_dim] from `first_place` on, as they were before their positions, in float32."""
        free = queries.float()
        free = free.clone() if free is queries else free
        self._rope.turn(first_place, queries.shape[-2], queries.device).undo(free)
        return free
