"""What the engine says to the model runner: one step's work, in numbers. No torch here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from worker.ids import BlockId


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence's share of a step: tokens [start, start + len(token_ids)) of it run through the model.

    Their keys and values are written at their positions' places in `block_table`, and each attends to every position
    up to its own: positions before `start` must already be in the blocks. `block_table[i]` holds positions
    [i * block_tokens, (i + 1) * block_tokens) and reaches at least the chunk's last position.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[BlockId]
    wants_logits: bool
    """Of the chunk's last token."""
    hears: Callable[[int, Any], None] | None = None
    """Told, in each layer, its number and the chunk's queries [heads, tokens, head_dim], turned to their positions."""
