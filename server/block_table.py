"""A map from block names to small numbers, in two arrays: 12 bytes an entry, and two cache misses to look one up.

Open addressing with linear probing. Knows nothing of what the numbers mean, but that 0 is none.
"""

import numpy as np
import numpy.typing as npt

_MIN_BITS = 6
_MAX_LOAD = 0.75
_LOAD_WHEN_BUILT = 0.45
_KEY_BITS = 58
"""Those from here on are equal in all keys of a table."""


class BlockTable:
    """Keys are 64 bits, evenly spread, not 0. An entry that is set to 0 keeps its place until the next rebuild."""

    __slots__ = ("_keys", "_mask", "_max_used", "_num_used", "_numbers", "_shift")

    def __init__(self) -> None:
        self._build(np.zeros(0, np.uint64), np.zeros(0, np.uint32))

    def get(self, key: int) -> int:
        """The number, 0 where there is none."""
        keys, at = self._keys, key >> self._shift & self._mask
        while (there := keys[at]) != key:
            if not there:
                return 0
            at = at + 1 & self._mask
        return self._numbers[at]

    def put(self, key: int, number: int) -> None:
        """Set the number of a key; 0: none."""
        keys, numbers, at = self._keys, self._numbers, key >> self._shift & self._mask
        free: int | None = None
        while (there := keys[at]) != key:
            if not there:
                self._insert(at if free is None else free, key, number)
                return
            if free is None and not numbers[at]:
                free = at
            at = at + 1 & self._mask
        numbers[at] = number

    def numbers(self) -> list[int]:
        """Different ones, 0 among them if it has a place."""
        found: list[int] = np.bincount(np.asarray(self._numbers)).nonzero()[0].tolist()
        return found

    def map_numbers(self, new: npt.NDArray[np.uint32]) -> None:
        """Make `new[number]` of each number. `new[0]` must be 0."""
        numbers = np.asarray(self._numbers)
        numbers[:] = new[numbers]

    def __len__(self) -> int:
        return int(np.count_nonzero(np.asarray(self._numbers)))

    def _insert(self, at: int, key: int, number: int) -> None:
        if not number:
            return
        self._num_used += not self._keys[at]
        self._keys[at], self._numbers[at] = key, number
        if self._num_used > self._max_used:
            keys, numbers = np.asarray(self._keys), np.asarray(self._numbers)
            living = numbers.nonzero()[0]
            self._build(keys[living], numbers[living])

    def _build(self, keys: npt.NDArray[np.uint64], numbers: npt.NDArray[np.uint32]) -> None:
        """Begin anew with these entries, and room for more."""
        bits = max(_MIN_BITS, int(len(keys) / _LOAD_WHEN_BUILT).bit_length())
        self._shift, self._mask = _KEY_BITS - bits, (1 << bits) - 1
        self._num_used, self._max_used = len(keys), int(_MAX_LOAD * (1 << bits))
        new_keys, new_numbers = np.zeros(1 << bits, np.uint64), np.zeros(1 << bits, np.uint32)
        left = np.arange(len(keys))
        at = (keys >> np.uint64(self._shift)).astype(np.int64) & self._mask
        while len(left):
            places = at[left]
            empty = new_keys[places] == 0
            new_keys[places[empty]] = keys[left[empty]]  # of those that want one place, one gets it
            placed = new_keys[places] == keys[left]
            new_numbers[places[placed]] = numbers[left[placed]]
            left = left[~placed]
            at[left] = at[left] + 1 & self._mask
        self._keys, self._numbers = new_keys.data, new_numbers.data
