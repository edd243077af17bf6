"""A bank's vectors in memory, one after the other, and which of them are nearest to a query. Knows rows alone.

Up to `exact_rows` all that are eligible are compared. Beyond, a graph proposes candidates, as soon as one is built;
these are compared exactly.
"""

import math
import os
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cache_store.banks import Vector
from server.banks.graph import Graph
from server.banks.scoring import best_first, cosines

EXACT_ROWS: Final = 200_000
"""Measured: comparing 100,000 of 384 numbers takes 11 ms, 1,000,000 take 108 ms; by a graph it is 1 ms."""
_LEAST_ROWS: Final = 256
_MARGIN: Final = 1.25
"""Candidates for each row that is wanted, besides those that are not eligible."""
_BUILT_AT_ONCE: Final = 2048


class Vectors:
    """A matrix [rows, dim] that grows."""

    def __init__(self, dim: int, *, exact_rows: int = EXACT_ROWS) -> None:
        self._matrix = np.empty((0, dim), np.float32)
        self._num_rows = 0
        self._exact_rows = exact_rows
        self._graph: Graph | None = None

    def __len__(self) -> int:
        return self._num_rows

    @property
    def nbytes(self) -> int:
        return self._matrix.nbytes + (self._graph.nbytes if self._graph is not None else 0)

    @property
    def matrix(self) -> NDArray[np.float32]:
        """[rows, dim]. What it shows stays as it is, whatever is added."""
        return self._matrix[: self._num_rows]

    @property
    def lacks_graph(self) -> bool:
        return self._graph is None and self._num_rows > self._exact_rows

    def add(self, vectors: Sequence[Vector]) -> None:
        """The next rows."""
        if not vectors:
            return
        num_rows = self._num_rows + len(vectors)
        if num_rows > len(self._matrix):
            grown = np.empty((max(num_rows, self._num_rows * 3 // 2, _LEAST_ROWS), self._matrix.shape[1]), np.float32)
            grown[: self._num_rows] = self.matrix
            self._matrix = grown
        self._matrix[self._num_rows : num_rows] = vectors
        self._num_rows = num_rows
        if self._graph is not None:
            self._graph.add(self._matrix[len(self._graph) : num_rows])

    def use_graph(self, graph: Graph) -> None:
        """From now on, once it has what was added since it was begun."""
        if len(graph) < self._num_rows:
            graph.add(self.matrix[len(graph) :])
        self._graph = graph

    def num_candidates(self, num_eligible: int, most: int) -> int:
        """How many to have proposed, of all rows, to find so many of those that are eligible; 0: none are needed."""
        if num_eligible <= self._exact_rows:
            return 0
        return min(self._num_rows, math.ceil(_MARGIN * most * self._num_rows / num_eligible))

    def nearest(
        self, query: Vector, eligible: NDArray[np.bool_], most: int, proposed: NDArray[np.intp] | None = None
    ) -> NDArray[np.intp]:
        """Rows that are eligible, by cosine, the nearest first. Candidates may be `proposed` by somebody else."""
        num_eligible = int(np.count_nonzero(eligible))
        candidates = self.num_candidates(num_eligible, most)
        if proposed is None and self._graph is not None and candidates:
            proposed = self._graph.near(query, candidates)
        if proposed is not None:
            near = proposed[eligible[proposed]]
            if len(near) >= min(most, num_eligible):  # else what is near is not eligible
                return self._by_cosine(query, np.sort(near), most)
        if 2 * num_eligible < self._num_rows:
            return self._by_cosine(query, np.flatnonzero(eligible), most)
        return best_first(np.where(eligible, cosines(self.matrix, query), -np.inf), most)

    def without(self, alive: NDArray[np.bool_]) -> "Vectors":
        """The rows that are `alive` alone, numbered anew in the same order."""
        left = Vectors(self._matrix.shape[1], exact_rows=self._exact_rows)
        left._matrix = self.matrix[alive]
        left._num_rows = len(left._matrix)
        return left

    def _by_cosine(self, query: Vector, rows: NDArray[np.intp], most: int) -> NDArray[np.intp]:
        return rows[best_first(cosines(self.matrix[rows], query), most)]


class GraphBuilder:
    """Builds a graph step by step over vectors as they are now, while they are searched and grow."""

    def __init__(self, vectors: Vectors) -> None:
        self._matrix = vectors.matrix
        self._graph = Graph(self._matrix.shape[1], threads=max(1, (os.cpu_count() or 1) // 2))

    def step(self) -> Graph | None:
        """The graph, once it has all. Takes about a second on a slow core."""
        first = len(self._graph)
        self._graph.add(self._matrix[first : first + _BUILT_AT_ONCE])
        return self._graph if len(self._graph) == len(self._matrix) else None
