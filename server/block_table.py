"""A map from block names to small numbers, in one array: 8 bytes an entry, and one cache miss to look one up.

Open addressing with linear probing. Knows nothing of what the numbers mean, but that 0 is none.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

TAG_BITS: Final = 40
MAX_NUMBER: Final = (1 << 24) - 1
_NUMBER_BITS = 64 - TAG_BITS
_MIN_BITS = 6
_MAX_LOAD = 0.75
_LOAD_WHEN_BUILT = 0.45


class BlockTable:
    """Keys are tags: 40 bits, evenly spread, not 0. An entry is a word, tag above number, so that finding the one is
    finding the other. An entry that is set to 0 keeps its place until the next rebuild."""

    __slots__ = ("_mask", "_max_used", "_num_used", "_shift", "_words")

    def __init__(self) -> None:
        self._build(np.zeros(0, np.uint64))

    def get(self, tag: int) -> int:
        """The number, 0 where there is none."""
        words, at = self._words, tag >> self._shift
        while (word := words[at]) >> _NUMBER_BITS != tag:
            if not word:
                return 0
            at = at + 1 & self._mask
        return word & MAX_NUMBER

    def put(self, tag: int, number: int) -> None:
        """Set the number of a tag, at most `MAX_NUMBER`; 0: none."""
        words, at = self._words, tag >> self._shift
        free: int | None = None
        while (word := words[at]) >> _NUMBER_BITS != tag:
            if not word:
                self._insert(at if free is None else free, tag << _NUMBER_BITS, number)
                return
            if free is None and not word & MAX_NUMBER:
                free = at
            at = at + 1 & self._mask
        words[at] = tag << _NUMBER_BITS | number

    def numbers(self) -> list[int]:
        """Different ones, 0 among them if it has a place."""
        found: list[int] = np.bincount(self._all_numbers()).nonzero()[0].tolist()
        return found

    def map_numbers(self, new: npt.NDArray[np.uint64]) -> None:
        """Make `new[number]` of each number. `new[0]` must be 0."""
        words, numbers = np.asarray(self._words), self._all_numbers()
        words ^= numbers.astype(np.uint64) ^ new[numbers]

    def __len__(self) -> int:
        return int(np.count_nonzero(self._all_numbers()))

    def _all_numbers(self) -> npt.NDArray[np.int64]:
        return (np.asarray(self._words) & np.uint64(MAX_NUMBER)).astype(np.int64)

    def _insert(self, at: int, tag_word: int, number: int) -> None:
        if not number:
            return
        self._num_used += not self._words[at]
        self._words[at] = tag_word | number
        if self._num_used > self._max_used:
            self._build(np.asarray(self._words)[self._all_numbers().nonzero()[0]])

    def _build(self, words: npt.NDArray[np.uint64]) -> None:
        """Begin anew with these entries, and room for more."""
        bits = max(_MIN_BITS, int(len(words) / _LOAD_WHEN_BUILT).bit_length())
        self._shift, self._mask = TAG_BITS - bits, (1 << bits) - 1
        self._num_used, self._max_used = len(words), int(_MAX_LOAD * (1 << bits))
        new = np.zeros(1 << bits, np.uint64)
        at = (words >> np.uint64(64 - bits)).astype(np.int64)
        while len(words):
            empty = new[at] == 0
            new[at[empty]] = words[empty]  # of those that want one place, one gets it
            left = new[at] != words
            words, at = words[left], at[left] + 1 & self._mask
        self._words = new.data
