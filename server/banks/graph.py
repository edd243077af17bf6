"""A graph over many vectors (HNSW, by usearch), to find near ones without looking at all. Knows rows alone.

It keeps vectors as 8-bit numbers: who asks it for candidates compares these exactly, with vectors of his own.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from cache_store.banks import Vector

_CONNECTIVITY: Final = 16
_EXPANSION_ADD: Final = 128
_EXPANSION_SEARCH: Final = 256


class Graph:
    """Not to be searched while something is added."""

    def __init__(self, dim: int, *, threads: int) -> None:
        """`threads` build it."""
        from usearch.index import Index  # 0.2 s, and a runtime of OpenMP: for who has a bank as large as that

        self._index = Index(
            ndim=dim,
            metric="ip",
            dtype="i8",
            connectivity=_CONNECTIVITY,
            expansion_add=_EXPANSION_ADD,
            expansion_search=_EXPANSION_SEARCH,
        )
        self._threads = threads

    def __len__(self) -> int:
        return len(self._index)

    @property
    def nbytes(self) -> int:
        return int(self._index.memory_usage)

    def add(self, vectors: NDArray[np.float32]) -> None:
        """The next rows, [n, dim]."""
        keys = np.arange(len(self), len(self) + len(vectors), dtype=np.uint64)
        self._index.add(keys, vectors, threads=self._threads)

    def near(self, query: Vector, most: int) -> NDArray[np.intp]:
        """Rows near the query: nearly all of the nearest are among them."""
        found = self._index.search(query, most, threads=1)
        return np.asarray(found.keys).astype(np.intp)
