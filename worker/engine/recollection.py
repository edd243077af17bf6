"""What one conversation recalls beyond its window: which pieces its latest queries ask for, layer by layer.

Knows representatives of what is gone and how queries are scored against them; no blocks, and no scheduler. Used by the
engine's thread alone.
"""

import torch

from worker.attention.recall_choice import choose

Choice = list[list[int]]
"""Of each layer, the units that it recalls, oldest first; unit n is tokens [n * unit_tokens, (n + 1) * unit_tokens)."""


class Recollection:
    def __init__(self, first_unit: int, num_layers: int) -> None:
        """`first_unit` is the oldest that may be recalled."""
        self.choices = 0
        self._first_unit = first_unit
        self._num_units = 0
        self._parts: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]
        self._heard: list[dict[int, torch.Tensor]] = [{} for _ in range(num_layers)]

    @property
    def next_unit(self) -> int:
        """The oldest unit whose representatives are not known yet."""
        return self._first_unit + self._num_units

    def add(self, representatives: torch.Tensor) -> None:
        """Those of the units from `next_unit` on: [layers, units, kv_heads, representatives, head_dim]."""
        for parts, layer in zip(self._parts, representatives, strict=True):
            parts.append(layer)
        self._num_units += representatives.shape[1]

    def hear(self, layer: int, first: int, queries: torch.Tensor) -> None:
        """Queries [heads, rows, head_dim] of one layer, of tokens from `first` on, as they were before their positions.

        Said again, after a step that failed, they are as they were.
        """
        self._heard[layer][first] = queries

    def choose(self, num_units: int, *, last_alone: bool) -> Choice:
        """The units that what was heard asks for, `num_units` in each layer; with `last_alone` by the last query only.

        Forgets what was heard.
        """
        self.choices += 1
        choice = []
        for layer, heard in enumerate(self._heard):
            queries = torch.cat([heard[first] for first in sorted(heard)], 1).transpose(0, 1).cpu()
            chosen = choose(queries[-1:] if last_alone else queries, self._of(layer), num_units)
            choice.append([self._first_unit + unit for unit in chosen.tolist()])
            heard.clear()
        return choice

    def _of(self, layer: int) -> torch.Tensor:
        parts = self._parts[layer]
        if len(parts) > 1:
            parts[:] = [torch.cat(parts)]
        return parts[0]
