"""Copies KV within the device's pool to other positions: values as they are, keys turned in float32 and rounded once.

Exact where a model turns its keys by llama's rotary positions (Su et al. 2021): those of positions p and q differ by
the rotation of q - p, whatever they hold. See `worker/tiers/codecs/rope_of.py` for how that is found out.
"""

import numpy as np
import numpy.typing as npt
import torch

from worker.tiers.codecs.rope import Rope, Turn

_Slots = npt.NDArray[np.int64]


class Placer:
    """Used by the engine's thread."""

    def __init__(self, pool: torch.Tensor, rope: Rope) -> None:
        """`pool` is KVCache.data: [layers, 2, kv_heads, slots, head_dim]."""
        self._pool = pool
        self._rope = rope

    def place(self, source: _Slots, target: _Slots, by: _Slots | int, layer: int | None = None) -> None:
        """Copy the KV in slots `source` to `target` (both [tokens]), each token `by` so many positions on.

        Of one layer, or of all. No slot may be in both.
        """
        pool = self._pool if layer is None else self._pool[layer : layer + 1]
        take, put = (torch.from_numpy(slots).to(pool.device) for slots in (source, target))
        turn = self._turn(by, len(source))
        for one in pool:
            keys = one[0].index_select(1, take).float()
            turn.apply(keys)
            one[0].index_copy_(1, put, keys.to(pool.dtype))
            one[1].index_copy_(1, put, one[1].index_select(1, take))

    def unturned(self, slots: _Slots, places: _Slots) -> torch.Tensor:
        """Keys of slots that stand at `places`, as they were before their positions, in float32:
        [layers, kv_heads, tokens, head_dim]."""
        take = torch.from_numpy(slots).to(self._pool.device)
        keys = self._pool[:, 0].index_select(2, take).float()
        self._rope.turns(places, self._pool.device).undo(keys)
        return keys

    def undo(self, queries: torch.Tensor, first_place: int) -> torch.Tensor:
        """Queries [heads, rows, head_dim] from `first_place` on, as they were before their positions, in float32."""
        free = queries.float()
        free = free.clone() if free is queries else free
        self._rope.turn(first_place, queries.shape[1], queries.device).undo(free)
        return free

    def _turn(self, by: _Slots | int, num_tokens: int) -> Turn:
        deltas = np.full(num_tokens, by, dtype=np.int64) if isinstance(by, int) else by
        return self._rope.turns(deltas, self._pool.device)
