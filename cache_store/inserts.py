"""Parts of a conversation whose KV was computed by itself and is inserted: where they are, and what names say of it.

A text that is read again and again (a document of a bank) is prefilled once, as a conversation of its own. Where it
stands in another one, its KV is copied, with keys turned to there; its first tokens alone are computed in place, as in
EPIC (Hu et al. 2024): by itself, a text's first tokens take the attention that belongs to a conversation's. Such KV is
not what the conversation would have computed, so the blocks that hold it, and all behind them, have names of their own.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from cache_store.errors import InvalidRequest

LINK_TOKENS = 16
"""The first tokens of an insert are computed where it stands."""


class Insert(NamedTuple):
    """Tokens [start, end) of a conversation."""

    start: int
    end: int

    @property
    def linked(self) -> int:
        """Where what is inserted of it begins."""
        return self.start + LINK_TOKENS


@dataclass(frozen=True)
class Inserts:
    """One conversation's."""

    bounds: tuple[int, ...] = ()
    """start, end, start, end, ..."""

    @cached_property
    def all(self) -> Sequence[Insert]:
        """Those that are longer than what is computed of them anyway, in order."""
        pairs = zip(self.bounds[0::2], self.bounds[1::2], strict=True)
        return [Insert(start, end) for start, end in pairs if end - start > LINK_TOKENS]

    def without(self, lost: Sequence[Insert]) -> "Inserts":
        """These are computed where they stand."""
        return Inserts(tuple(bound for insert in self.all if insert not in lost for bound in insert))

    def salt(self, tokens: Sequence[int], start: int, end: int) -> bytes:
        """What the name of the block of `tokens[start:end]` depends on beside those and all before them: which of them
        were inserted, and where that began."""
        marks = [
            f"i{insert.start - start}+{LINK_TOKENS}:{min(insert.end, end) - start}" for insert in self._in(start, end)
        ]
        return " ".join(marks).encode()

    def _in(self, start: int, end: int) -> Iterator[Insert]:
        """Those of which tokens [start, end) hold something that is inserted."""
        for insert in self.all[max(0, bisect_right(self.all, (start, 0)) - 1) :]:
            if insert.linked >= end:
                return
            if insert.end > start:
                yield insert


NO_INSERTS = Inserts()


def check_inserts(field: str, bounds: Sequence[int], start: int, end: int) -> None:
    """Raises InvalidRequest where bounds are not those of parts of tokens [start, end), one behind the other."""
    if len(bounds) % 2:
        raise InvalidRequest(field, "must be start and end of each part")
    if bounds and (list(bounds) != sorted(bounds) or bounds[0] < start or bounds[-1] > end):
        raise InvalidRequest(field, f"must grow from {start} to {end} at the most")
