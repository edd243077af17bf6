"""All of a bank that a search needs, in this process's memory: vectors, words, and what filters ask for.

It is brought up to date by what a store says has changed, and is then the bank as it was at a version. Texts are not
here: who has found entries reads them from the store.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_store.bank_store import Changes, Seen
from cache_store.banks import BankRecord, Entry, EntryFilter, Kept, Use, Vector
from server.banks import scoring
from server.banks.bm25 import Bm25
from server.banks.vectors import EXACT_ROWS, Vectors

Bools = NDArray[np.bool_]

_LEAST_DEPTH: Final = 20
_MOST_DEPTH: Final = 200
_DEPTH_PER_ENTRY: Final = 4
"""How far down each of the two rankings entries are looked at, for each that is wanted."""
_BYTES_PER_ROW: Final = 350
"""An id, its place in a dict, and numbers, beside vectors and words."""
_BYTES_PER_TAG: Final = 250
_LEAST_GONE: Final = 1024
_COLUMNS: Final = np.dtype(
    [
        ("created_ms", np.int64),
        ("last_ms", np.int64),
        ("recalls", np.int64),
        ("importance", np.float32),
        ("kind", np.int8),
        ("alive", np.bool_),
        ("superseded", np.bool_),
    ]
)


class Found(NamedTuple):
    """Candidates, in no order; all arrays are [n]."""

    rows: NDArray[np.intp]
    ids: list[str]
    relevance: scoring.Floats
    cosine: NDArray[np.float32]
    bm25: NDArray[np.float32]


class BankIndex:
    """Not to be used by two threads at once."""

    def __init__(self, *, exact_rows: int = EXACT_ROWS) -> None:
        """Of more than `exact_rows` not all are compared, once their graph is built."""
        self.seen = Seen()
        self._exact_rows = exact_rows
        self._begin(0)

    def __len__(self) -> int:
        return len(self._row_of)

    @property
    def nbytes(self) -> int:
        """About what it takes in memory."""
        rows = _BYTES_PER_ROW * len(self._ids) + self._tag_bytes
        return self.vectors.nbytes + self._bm25.nbytes + rows

    def apply(self, changes: Changes) -> None:
        if changes.from_nothing:
            self._begin(changes.bank.embedding_dim)
        new = []
        for kept in changes.kept:
            row = self._row_of.get(kept.entry.id)
            if row is None:
                new.append(kept)
            else:
                self._columns[row] = _column_of(kept.entry)
        self._add(new)
        for entry_id in changes.gone:
            row = self._row_of.pop(entry_id, None)
            if row is not None:
                self._columns["alive"][row] = False
        self.seen = changes.seen
        num_gone = len(self._ids) - len(self._row_of)
        if num_gone > max(_LEAST_GONE, len(self._ids) // 3):
            self._tidy()

    def set_uses(self, uses: Mapping[str, Use]) -> None:
        """How often these were recalled, and when last."""
        for entry_id, use in uses.items():
            row = self._row_of.get(entry_id)
            if row is not None:
                self._columns["recalls"][row], self._columns["last_ms"][row] = use

    def num_candidates(self, where: EntryFilter, *, k: int, with_superseded: bool) -> int:
        """How many of the nearest somebody else may propose to `search`; 0: it needs none."""
        eligible = self._eligible(where, with_superseded=with_superseded)
        return self.vectors.num_candidates(int(np.count_nonzero(eligible)), _depth(k))

    def search(
        self,
        query: str,
        vector: Vector,
        where: EntryFilter,
        *,
        k: int,
        with_superseded: bool,
        near: Sequence[str] | None = None,
    ) -> Found:
        """The most relevant entries by cosine and by BM25, both fused: enough to choose k of. `near` are ids that
        somebody else proposes."""
        depth = _depth(k)
        eligible = self._eligible(where, with_superseded=with_superseded)
        proposed = None
        if near is not None:
            proposed = np.array([self._row_of[one] for one in near if one in self._row_of], np.intp)
        nearest = self.vectors.nearest(vector, eligible, depth, proposed)
        by_words = self._bm25.scores(query)
        ranked = scoring.best_first(np.where(eligible & (by_words > 0), by_words, -np.inf), depth)
        rows = np.union1d(nearest, ranked)
        relevance = scoring.fused([np.searchsorted(rows, nearest), np.searchsorted(rows, ranked)], len(rows), depth)
        cosine = scoring.cosines(self.vectors.matrix[rows], vector)
        return Found(rows, [self._ids[row] for row in rows], relevance, cosine, by_words[rows])

    def ranked(self, bank: BankRecord, found: Found, uses: Sequence[Use], *, k: int, now_ms: int) -> list["Ranked"]:
        """The k best of them by all that counts, without too much of the same; `uses` are what the store says now."""
        columns = self._columns[found.rows]
        recalls = np.array([use.recalls for use in uses], np.int64)
        last_ms = np.maximum(columns["created_ms"], np.array([use.last_ms for use in uses], np.int64))
        retained = scoring.retention(now_ms, last_ms, recalls)
        scores = scoring.score(bank.settings, found.relevance, retained, columns["importance"].astype(np.float64))
        vectors = self.vectors.matrix[found.rows]
        chosen = scoring.diverse(scores, vectors, k, bank.settings.diversity)
        made_of = np.stack([scores, found.cosine, found.bm25, found.relevance, retained], axis=1)
        return [Ranked(found.ids[place], uses[place], tuple(made_of[place].tolist())) for place in chosen]

    def matching(self, where: EntryFilter, *, unused_since_ms: int | None = None) -> list[str]:
        """Ids of entries that pass, superseded or not, and that were neither recalled nor created since then (as far
        as is known here), the oldest first."""
        eligible = self._eligible(where, with_superseded=True)
        columns = self._columns[: len(self._ids)]
        if unused_since_ms is not None:
            eligible &= np.maximum(columns["created_ms"], columns["last_ms"]) < unused_since_ms
        rows = np.flatnonzero(eligible)
        rows = rows[np.argsort(columns["created_ms"][rows], kind="stable")]
        return [self._ids[row] for row in rows]

    def _begin(self, dim: int) -> None:
        self._ids: list[str] = []
        self._row_of: dict[str, int] = {}
        """Of those that are alive."""
        self._columns = np.zeros(0, _COLUMNS)
        self._tags: dict[tuple[str, str], array[int]] = {}
        """Rows by what a filter may ask for: a document, a session, a pair of metadata."""
        self._tag_bytes = 0
        self.vectors = Vectors(dim, exact_rows=self._exact_rows)
        self._bm25 = Bm25()

    def _add(self, new: Sequence[Kept]) -> None:
        first = len(self._ids)
        if first + len(new) > len(self._columns):
            grown = np.zeros(max(first + len(new), first * 3 // 2, _LEAST_GONE), _COLUMNS)
            grown[:first] = self._columns[:first]
            self._columns = grown
        for row, (entry, _) in enumerate(new, start=first):
            self._ids.append(entry.id)
            self._row_of[entry.id] = row
            self._bm25.add(entry.text)
            for tag in _tags_of(entry):
                if tag not in self._tags:
                    self._tags[tag] = array("I")
                    self._tag_bytes += _BYTES_PER_TAG
                self._tags[tag].append(row)
                self._tag_bytes += 4
            self._columns[row] = _column_of(entry)
        self.vectors.add([vector for _, vector in new])

    def _eligible(self, where: EntryFilter, *, with_superseded: bool) -> Bools:
        columns = self._columns[: len(self._ids)]
        eligible: Bools = columns["alive"].copy()
        if not with_superseded:
            eligible &= ~columns["superseded"]
        for tag in _tags_asked(where):
            eligible &= self._having(tag)
        if where.not_session_id:
            eligible &= ~self._having(("session", where.not_session_id))
        if where.kinds:
            eligible &= np.isin(columns["kind"], [int(kind) for kind in where.kinds])
        if where.created_after_ms:
            eligible &= columns["created_ms"] >= where.created_after_ms
        if where.created_before_ms:
            eligible &= columns["created_ms"] < where.created_before_ms
        return eligible

    def _having(self, tag: tuple[str, str]) -> Bools:
        having = np.zeros(len(self._ids), bool)
        if tag in self._tags:
            having[np.frombuffer(self._tags[tag], np.uint32)] = True
        return having

    def _tidy(self) -> None:
        """Drop the rows of what is gone."""
        alive: Bools = self._columns["alive"][: len(self._ids)].copy()
        numbers = np.cumsum(alive) - 1
        self.vectors, self._bm25 = self.vectors.without(alive), self._bm25.without(alive)
        self._columns = self._columns[: len(alive)][alive]
        self._ids = [entry_id for entry_id, is_alive in zip(self._ids, alive, strict=True) if is_alive]
        self._row_of = {entry_id: row for row, entry_id in enumerate(self._ids)}
        tags = {tag: np.frombuffer(rows, np.uint32) for tag, rows in self._tags.items()}
        left = {tag: numbers[rows[alive[rows]]].astype(np.uint32) for tag, rows in tags.items()}
        self._tags = {tag: array("I", rows.tobytes()) for tag, rows in left.items() if len(rows)}


class Ranked(NamedTuple):
    """An entry that was found and chosen, and what its score is made of."""

    id: str
    use: Use
    made_of: tuple[float, float, float, float, float]
    """Score, cosine, BM25, relevance, retention."""


def _depth(k: int) -> int:
    return min(_MOST_DEPTH, max(_LEAST_DEPTH, _DEPTH_PER_ENTRY * k))


def _column_of(entry: Entry) -> tuple[int | float | bool, ...]:
    numbers = (entry.created_ms, entry.last_recalled_ms, entry.recalls, entry.importance, entry.kind)
    return (*numbers, True, bool(entry.superseded_by))


def _tags_of(entry: Entry) -> Iterable[tuple[str, str]]:
    return _tags(entry.metadata, entry.document_id, entry.session_id)


def _tags_asked(where: EntryFilter) -> Iterable[tuple[str, str]]:
    return _tags(where.metadata, where.document_id, where.session_id)


def _tags(metadata: Mapping[str, str], document_id: str, session_id: str) -> Iterable[tuple[str, str]]:
    yield from ((f"metadata/{key}", value) for key, value in metadata.items())
    if document_id:
        yield "document", document_id
    if session_id:
        yield "session", session_id
