"""What one conversation recalls beyond its window: which pieces its latest queries ask for, by layer and KV head.

Knows representatives of what is gone, and what is in the slots; no blocks, and no scheduler. Used by the engine's
thread alone.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from worker.attention.recall_choice import (
    LARGEST,
    REPRESENTED_TOKENS,
    Known,
    Look,
    Looking,
    Represented,
    Shares,
)

_ASKED_FOR = 0.02
"""The share of one query's attention over all units from which on a unit is asked for."""
_AT_ONCE = 12
"""Units that go in then: that one, and those that come next. Both numbers were tried out with the recall model."""
_LOOKING = 0.001
"""A KV head looks in a turn's reply where one of the turn's asking queries had at least such a share for a unit: many
are as near to all that is gone. (With fewer units than a thousand all look: one of them has as much of any softmax.)"""
CHOSEN_BY = (_ASKED_FOR, _AT_ONCE, _LOOKING, REPRESENTED_TOKENS, LARGEST)
"""All that a choice depends on beside queries and keys."""

Choice = npt.NDArray[np.int64]
"""[layers, kv_heads, slots]: units, oldest first; unit n is tokens [n * unit_tokens, (n + 1) * unit_tokens)."""


class Recollection:
    def __init__(
        self, first_unit: int, num_slots: int, undo: Callable[[torch.Tensor, int], torch.Tensor], look: Look
    ) -> None:
        """`first_unit` is the oldest that may be recalled, `num_slots` of them at once. `undo` makes queries
        [..., rows, head_dim] from a place on what they were before their positions, in float32."""
        self.choices = 0
        self._first_unit = first_unit
        self._num_slots = num_slots
        self._undo = undo
        self._look = look
        self._known = Known()
        self._heard: dict[int, dict[int, torch.Tensor]] = {}
        self._asked: npt.NDArray[np.int64] | None = None
        self._looking: Looking | None = None
        self._time = 0

    @property
    def next_unit(self) -> int:
        """The oldest unit whose representatives are not known yet."""
        return self._first_unit + self._known.num_units

    def add(self, represented: Represented) -> None:
        """The units from `next_unit` on."""
        self._known.add(represented)

    def latest(self) -> Choice:
        """The latest units, for all alike."""
        layers, kv_heads = self._known.parts[0].scales.shape[:2]
        units = np.arange(self.next_unit - self._num_slots, self.next_unit)
        self._asked = self._looking = None
        return np.broadcast_to(units, (layers, kv_heads, self._num_slots)).copy()

    def hear(self, layer: int, first: int, queries: torch.Tensor) -> None:
        """Queries [heads, rows, head_dim] of one layer, of tokens that stand at `first` and behind it, turned to there.
        Each follows what was heard before, or is said again, after a step that failed."""
        self._heard.setdefault(layer, {})[first] = queries

    def choose(self) -> Choice:
        """The units that are asked for most by what was heard, which is forgotten."""
        self.choices += 1
        self._time += 1
        shares = self._look(self._queries(), self._known)
        self._looking = shares.max(2) >= _LOOKING
        units = np.stack([_most(of_head, self._num_slots) for of_head in shares.reshape(-1, shares.shape[-1])])
        self._asked = np.full((*shares.shape[:2], self._num_slots), self._time)
        chosen: Choice = np.sort(units).reshape(self._asked.shape) + self._first_unit
        return chosen

    def amend(self, choice: Choice) -> Choice | None:
        """`choice` with what is asked for by what was heard, and not in it, in the place of what was not asked for
        longest. None where nothing is; what was heard is forgotten."""
        shares = self._look(self._queries(), self._known, self._looking)
        self._time += 1
        if self._asked is None:
            self._asked = np.zeros(choice.shape, dtype=np.int64)
        amended = choice.copy()
        for layer, head in np.argwhere(shares.max(2) >= _ASKED_FOR):  # of most heads nothing is asked for
            asked, units = shares[layer, head], choice[layer, head] - self._first_unit
            self._asked[layer, head, asked[units] >= _ASKED_FOR] = self._time
            asked[units] = -1.0
            if asked.max() >= _ASKED_FOR:
                new = _most(asked, min(_AT_ONCE, self._num_slots, len(asked) - self._num_slots))
                self._put(amended[layer, head], self._asked[layer, head], new + self._first_unit)
        if np.array_equal(amended, choice):
            return None
        self.choices += 1
        return amended

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


def _most(asked: Shares, count: int) -> npt.NDArray[np.int64]:
    """The units that are asked for most; of those as good as each other the oldest."""
    least = np.partition(asked, -count)[-count]
    near = np.flatnonzero(asked >= least)
    return near[np.argsort(-asked[near], kind="stable")[:count]]
