"""Representatives of blocks that have left their conversation's window, kept by the blocks' names from turn to turn."""

from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch

from cache_store.ids import BlockHash, TenantMark, mark_of
from worker.attention.recall_choice import Represented


class Representatives:
    """Least recently used go first. Used by the engine's thread alone."""

    def __init__(self, make: Callable[[torch.Tensor], Represented], *, max_bytes: int) -> None:
        """`make` makes those of a block's units from its keys before their positions, float32
        [layers, kv_heads, tokens, head_dim]."""
        self._make = make
        self._max_bytes = max_bytes
        self._kept: OrderedDict[BlockHash, Represented] = OrderedDict()
        self._num_bytes = 0

    def find(self, name: BlockHash) -> Represented | None:
        kept = self._kept.get(name)
        if kept is not None:
            self._kept.move_to_end(name)
        return kept

    def keep(self, name: BlockHash, keys: torch.Tensor) -> Represented:
        """Make a block's from its keys. What is returned stays as it is, whatever is dropped."""
        made = self._make(keys)
        if name not in self._kept:
            self._num_bytes += made.nbytes
        self._kept[name] = made
        while self._num_bytes > self._max_bytes and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._num_bytes -= oldest.nbytes
        return made

    def forget_tenant(self, mark: TenantMark) -> None:
        self.forget([name for name in self._kept if mark_of(name) == mark])

    def forget(self, names: Iterable[BlockHash]) -> None:
        """Of blocks that were wrong, or are being deleted."""
        for name in names:
            kept = self._kept.pop(name, None)
            if kept is not None:
                self._num_bytes -= kept.nbytes
