"""What one conversation recalls beyond its window: which pieces its latest queries ask for, by layer and KV head.

Knows representatives of what is gone, and what is in the slots; no blocks, and no scheduler. Used by the engine's
thread alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from worker.attention.recall_choice import shares, spread

_ASKED_FOR = 0.05
"""The share of one query's attention over all units from which on a unit is asked for."""

_AT_ONCE = 8
"""Units that one token may ask for."""
_LOOK_EVERY = 8
"""Tokens of a reply for which one look at all units is enough: in between only those are looked at that the latest
tokens before came nearest to."""
_LOOKING = 4
"""So many of them are asked whom they came near to;"""
_SHORT_SHARE = 16
"""one unit in so many is looked at,"""
_SHORT_LEAST = 64
"""and at least so many."""

Choice = npt.NDArray[np.int64]
"""[layers, kv_heads, slots]: units, oldest first; unit n is tokens [n * unit_tokens, (n + 1) * unit_tokens)."""


@dataclass(frozen=True, slots=True)
class _Shortlist:
    """Some units of each layer and KV head."""

    units: torch.Tensor
    """[layers, kv_heads, n], from the first that may be recalled on; the nearest first."""
    representatives: torch.Tensor
    """[layers, kv_heads, n, representatives, head_dim]"""

    def shares(self, queries: torch.Tensor, num_units: int) -> torch.Tensor:
        """[layers, kv_heads, num_units]: of all others none."""
        found = shares(queries, self.representatives, num_units - self.units.shape[2])
        return found.new_zeros(*found.shape[:2], num_units).scatter_(2, self.units, found)


class Recollection:
    def __init__(self, first_unit: int, num_slots: int, undo: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        """`first_unit` is the oldest that may be recalled, `num_slots` of them at once. `undo` makes queries
        [..., rows, head_dim] from a place on what they were before their positions, in float32."""
        self.choices = 0
        self._first_unit = first_unit
        self._num_slots = num_slots
        self._undo = undo
        self._parts: list[torch.Tensor] = []
        self._num_units = 0
        self._heard: dict[int, dict[int, torch.Tensor]] = {}
        self._asked: npt.NDArray[np.int64] | None = None
        self._time = 0
        self._latest_queries: list[torch.Tensor] = []
        self._short: _Shortlist | None = None
        self._num_since_look = 0

    @property
    def next_unit(self) -> int:
        """The oldest unit whose representatives are not known yet."""
        return self._first_unit + self._num_units

    def add(self, representatives: torch.Tensor) -> None:
        """Those of the units from `next_unit` on: [layers, kv_heads, units, representatives, head_dim]."""
        self._parts.append(representatives)
        self._num_units += representatives.shape[2]

    def latest(self) -> Choice:
        """The latest units, for all alike."""
        layers, kv_heads = self._all().shape[:2]
        units = np.arange(self.next_unit - self._num_slots, self.next_unit)
        self._asked, self._short, self._latest_queries = None, None, []
        return np.broadcast_to(units, (layers, kv_heads, self._num_slots)).copy()

    def hear(self, layer: int, first: int, queries: torch.Tensor) -> None:
        """Queries [heads, rows, head_dim] of one layer, of tokens that stand at `first` and behind it, turned to there.
        Each follows what was heard before, or is said again, after a step that failed."""
        self._heard.setdefault(layer, {})[first] = queries

    def choose(self) -> Choice:
        """The units that are asked for most by what was heard, which is forgotten."""
        self.choices += 1
        self._time += 1
        queries = self._queries()
        asked = spread(shares(queries, self._all()))
        self._look(queries[:, -_LOOKING:])
        units = asked.topk(self._num_slots).indices.sort().values
        self._asked = np.full(tuple(units.shape), self._time)
        chosen: Choice = units.numpy() + self._first_unit
        return chosen

    def amend(self, choice: Choice) -> Choice | None:
        """`choice` with what is asked for by what was heard, and not in it, in the place of what was not asked for
        longest. None where nothing is; what was heard is forgotten."""
        queries = self._queries()
        self._latest_queries = [*self._latest_queries[1 - _LOOKING :], queries]
        self._num_since_look += 1
        if self._short is None or self._num_since_look >= _LOOK_EVERY:
            self._look(torch.cat(self._latest_queries, 1))
        assert self._short is not None
        asked = spread(self._short.shares(queries, self._num_units)).numpy()
        self._time += 1
        if self._asked is None:
            self._asked = np.zeros(choice.shape, dtype=np.int64)
        held = np.take_along_axis(asked, choice - self._first_unit, 2)
        self._asked[held >= _ASKED_FOR] = self._time
        np.put_along_axis(asked, choice - self._first_unit, 0.0, 2)
        asking = asked.max(2) >= _ASKED_FOR
        if not asking.any():
            return None
        self.choices += 1
        amended = choice.copy()
        for layer, head in np.argwhere(asking):
            new = np.argsort(-asked[layer, head], kind="stable")[: min(_AT_ONCE, self._num_slots)]
            self._put(amended[layer, head], self._asked[layer, head], new + self._first_unit)
        return amended

    def _look(self, queries: torch.Tensor) -> None:
        """Find the units that these queries came nearest to."""
        everything = self._all()
        number = min(self._num_units, max(_SHORT_LEAST, self._num_units // _SHORT_SHARE))
        nearest = shares(queries, everything).topk(number).indices
        layers, heads = torch.meshgrid(*(torch.arange(size) for size in nearest.shape[:2]), indexing="ij")
        self._short = _Shortlist(nearest, everything[layers[..., None], heads[..., None], nearest].float())
        self._num_since_look = 0

    def _put(self, units: npt.NDArray[np.int64], asked: npt.NDArray[np.int64], new: npt.NDArray[np.int64]) -> None:
        """Exchange the units that were not asked for longest (of these the oldest) for new ones; keep them in order."""
        out = np.lexsort((units, asked))[: len(new)]
        units[out], asked[out] = new, self._time
        order = np.argsort(units)
        units[:], asked[:] = units[order], asked[order]

    def _queries(self) -> torch.Tensor:
        """[layers, rows, heads, head_dim], float32."""
        first = min(self._heard[0])
        layers = [torch.cat([of[at] for at in sorted(of)], 1) for _, of in sorted(self._heard.items())]
        self._heard.clear()
        return self._undo(torch.stack(layers), first).transpose(1, 2).cpu()

    def _all(self) -> torch.Tensor:
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts, 2)]
        return self._parts[0]
