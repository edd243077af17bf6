"""What an entry is worth to a query: pure functions of numbers. Knows no banks, no texts, no store.

A score is the sum of relevance, retention and importance, each from 0 to 1, times the bank's weights, divided by the
sum of the weights: so it is from 0 to 1 too. Forgetting lowers a score. It deletes nothing.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cache_store.banks import BankSettings

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RRF_K: Final = 60
"""Of reciprocal rank fusion (Cormack, Clarke and Buettcher 2009)."""
_DAY_MS: Final = 86_400_000.0
_RETENTION_DAYS: Final = 5.0


def retention(now_ms: int, last_ms: Ints, recalls: Ints) -> Floats:
    """[n]: exp(-t / (5 S)), 1 for what was recalled (or created) just now, less the longer ago that is.

    t are days since `last_ms`, S = 1 + recalls is the strength: each recall slows forgetting. This is the forgetting
    curve of MemoryBank (Zhong et al. 2023). The code published with it computes `math.exp(-t / 5*S)`, which by the
    precedence of operators is exp(-t S / 5): there strength makes forgetting *faster*.
    """
    days = np.maximum(now_ms - last_ms, 0) / _DAY_MS
    retained: Floats = np.exp(-days / (_RETENTION_DAYS * (1.0 + recalls)))
    return retained


def fused(rankings: Sequence[NDArray[np.intp]], num_rows: int, depth: int) -> Floats:
    """[num_rows]: reciprocal rank fusion of rankings (rows, best first; each at most `depth` long), from 0 to 1.

    A row counts 1 / (60 + rank) in each ranking, and in one that lacks it as much as one behind its end. The sum is
    scaled so that the first in all rankings has 1 and what is in none has 0, whatever else was found: so it can be
    weighed against retention and importance. A ranking that is empty (no word of the query is in the bank) has no say.
    """
    total = np.zeros(num_rows)
    having = [ranking for ranking in rankings if len(ranking)]
    last, first = 1.0 / (RRF_K + depth + 1), 1.0 / (RRF_K + 1)
    for ranking in having:
        assert len(ranking) <= depth, f"{len(ranking)} ranks, and a depth of {depth}"
        ranks = np.arange(1, len(ranking) + 1)
        total[ranking] += (1.0 / (RRF_K + ranks) - last) / (first - last) / len(having)
    return total


def score(settings: BankSettings, relevance: Floats, retained: Floats, importance: Floats) -> Floats:
    """[n]: the weighted mean of the three; where all weights are 0, the relevance."""
    weights = np.array([settings.relevance_weight, settings.recency_weight, settings.importance_weight])
    if not weights.any():
        return relevance
    total: Floats = (weights @ np.stack([relevance, retained, importance])) / weights.sum()
    return total


def cosines(vectors: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n]: of unit vectors [n, dim] with one, [dim].

    On this thread alone: BLAS wakes others for it, and where cores are busy these come late (16 ms instead of 0.6 for
    10,000).
    """
    return np.asarray(np.einsum("nd,d->n", vectors, query), np.float32)


def diverse(scores: Floats, vectors: NDArray[np.float32], k: int, diversity: float) -> list[int]:
    """Choose k of n by maximal marginal relevance (Carbonell and Goldstein 1998), the best first.

    Each next one has the largest `diversity * score - (1 - diversity) * similarity` to the most similar that is chosen
    already, the cosine of their `vectors`, [n, dim]. With 1 it is the order of scores, among equals the earlier one
    first.
    """
    chosen: list[int] = []
    nearest = np.zeros(len(scores))
    left = np.ones(len(scores), bool)
    while len(chosen) < min(k, len(scores)):
        marginal = np.where(left, diversity * scores - (1.0 - diversity) * nearest, -np.inf)
        best = int(np.argmax(marginal))
        chosen.append(best)
        left[best] = False
        nearest = np.maximum(nearest, cosines(vectors, vectors[best]))
    return chosen


def best_first(values: NDArray[np.floating], most: int) -> NDArray[np.intp]:
    """Places of the largest values above -inf, best first; among equals the earlier one."""
    if most < len(values):
        places = np.argpartition(values, len(values) - most)[len(values) - most :]
        places = np.flatnonzero(values >= values[places].min())  # else equals at the edge are chosen by chance
    else:
        places = np.arange(len(values))
    order = places[np.argsort(-values[places], kind="stable")][:most]
    return order[values[order] > -np.inf]
