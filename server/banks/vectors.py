"""A bank's vectors in memory, one after the other, and which of them are nearest to a query. Knows rows alone."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cache_store.banks import Vector
from server.banks.scoring import best_first

_LEAST_ROWS: Final = 256


class Vectors:
    """A matrix [rows, dim] that grows."""

    def __init__(self, dim: int) -> None:
        self._matrix = np.empty((0, dim), np.float32)
        self._num_rows = 0

    def __len__(self) -> int:
        return self._num_rows

    @property
    def nbytes(self) -> int:
        return self._matrix.nbytes

    @property
    def matrix(self) -> NDArray[np.float32]:
        """[rows, dim]. What it shows stays as it is, whatever is added."""
        return self._matrix[: self._num_rows]

    def add(self, vectors: Sequence[Vector]) -> None:
        """The next rows."""
        num_rows = self._num_rows + len(vectors)
        if num_rows > len(self._matrix):
            grown = np.empty((max(num_rows, self._num_rows * 3 // 2, _LEAST_ROWS), self._matrix.shape[1]), np.float32)
            grown[: self._num_rows] = self.matrix
            self._matrix = grown
        if vectors:
            self._matrix[self._num_rows : num_rows] = vectors
        self._num_rows = num_rows

    def nearest(self, query: Vector, eligible: NDArray[np.bool_], most: int) -> NDArray[np.intp]:
        """Rows that are eligible, by cosine, the nearest first."""
        cosines = np.where(eligible, self.matrix @ query, -np.inf)
        return best_first(cosines, most)

    def without(self, alive: NDArray[np.bool_]) -> "Vectors":
        """The rows that are `alive` alone, numbered anew in the same order."""
        left = Vectors(self._matrix.shape[1])
        left._matrix = self.matrix[alive]
        left._num_rows = len(left._matrix)
        return left
