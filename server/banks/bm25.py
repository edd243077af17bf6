"""Okapi BM25 over texts that are added one by one. Knows rows and words; knows no vectors and no banks.

Rows are numbered from 0 in the order in which they were added. One that is gone stays in the counts until `without`
makes a new index of what is left, as in Lucene; who searches leaves it out.
"""

import math
import re
import unicodedata
from array import array
from collections import Counter
from typing import Final

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"\w+")
_BYTES_PER_WORD: Final = 400
"""Two arrays, a string, and places in two dicts."""


def words(text: str) -> list[str]:
    """In compatibility form (NFKC), without regard to case."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def idf(num_rows: int, num_having: int) -> float:
    """Of a word that `num_having` rows have. Never negative (the form that Lucene uses)."""
    return math.log(1 + (num_rows - num_having + 0.5) / (num_having + 0.5))


class Bm25:
    def __init__(self, *, k1: float = 1.2, b: float = 0.75) -> None:
        """`k1` says how much it counts that a word comes again, `b` how much a long text pays for its length."""
        self._k1, self._b = k1, b
        self._rows: dict[str, array[int]] = {}
        self._counts: dict[str, array[int]] = {}
        """By word: the rows that have it, ascending, and how often."""
        self._lengths = array("I")
        self._num_words = 0
        self._num_postings = 0

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def nbytes(self) -> int:
        """About what it takes in memory."""
        return 8 * self._num_postings + _BYTES_PER_WORD * len(self._rows) + 4 * len(self._lengths)

    def add(self, text: str) -> None:
        """The next row."""
        row, counts = len(self._lengths), Counter(words(text))
        for word, count in counts.items():
            if word not in self._rows:
                self._rows[word], self._counts[word] = array("I"), array("I")
            self._rows[word].append(row)
            self._counts[word].append(count)
        self._lengths.append(counts.total())
        self._num_words += counts.total()
        self._num_postings += len(counts)

    def scores(self, query: str) -> NDArray[np.float32]:
        """[rows]: 0 for a row that has no word of the query."""
        total = np.zeros(len(self), np.float32)
        if not self._num_words:
            return total
        lengths = np.frombuffer(self._lengths, np.uint32)
        mean = self._num_words / len(self)
        for word, times in Counter(words(query)).items():
            if word in self._rows:
                rows = np.frombuffer(self._rows[word], np.uint32)
                counts = np.frombuffer(self._counts[word], np.uint32).astype(np.float32)
                slowness = self._k1 * (1 - self._b + self._b * lengths[rows] / mean)
                weight = times * idf(len(self), len(rows)) * (self._k1 + 1)
                total[rows] += (weight * counts / (counts + slowness)).astype(np.float32)
        return total

    def without(self, alive: NDArray[np.bool_]) -> "Bm25":
        """An index of the rows that are `alive` alone, numbered anew in the same order."""
        left = Bm25(k1=self._k1, b=self._b)
        numbers = np.cumsum(alive, dtype=np.uint32) - 1
        for word, packed in self._rows.items():
            rows = np.frombuffer(packed, np.uint32)
            stays = alive[rows]
            if stays.any():
                left._rows[word] = array("I", numbers[rows[stays]].tobytes())
                left._counts[word] = array("I", np.frombuffer(self._counts[word], np.uint32)[stays].tobytes())
                left._num_postings += int(stays.sum())
        lengths = np.frombuffer(self._lengths, np.uint32)[alive]
        left._lengths, left._num_words = array("I", lengths.tobytes()), int(lengths.sum())
        return left
