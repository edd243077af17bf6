"""Representatives of blocks that have left their conversation's window, kept by the blocks' names from turn to turn."""

from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch

from cache_store.ids import BlockHash, TenantMark, mark_of


class Representatives:
    """Least recently used go first. Used by the engine's thread alone."""

    def __init__(self, make: Callable[[torch.Tensor], torch.Tensor], *, dtype: torch.dtype, max_bytes: int) -> None:
        """Kept in `dtype`. `make` makes those of a block's units, [layers, kv_heads, units, representatives, head_dim],
        from its keys before their positions, float32 [layers, kv_heads, tokens, head_dim]."""
        self._make = make
        self._dtype = dtype
        self._max_bytes = max_bytes
        self._kept: OrderedDict[BlockHash, torch.Tensor] = OrderedDict()
        self._num_bytes = 0

    def find(self, name: BlockHash) -> torch.Tensor | None:
        kept = self._kept.get(name)
        if kept is not None:
            self._kept.move_to_end(name)
        return kept

    def keep(self, name: BlockHash, keys: torch.Tensor) -> torch.Tensor:
        """Make a block's from its keys. What is returned stays as it is, whatever is dropped."""
        made = self._make(keys).to(self._dtype).cpu()
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
