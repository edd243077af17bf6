"""Scores of entries: BM25, fused ranks, forgetting, and what is like what is there already."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_store.banks import BankSettings
from server.banks.bm25 import Bm25, words
from server.banks.scoring import best_first, diverse, fused, retention, score

DAY_MS = 86_400_000
WORDS = st.lists(st.sampled_from(["ant", "bee", "cat", "dog", "elk", "fox"]), min_size=1, max_size=8).map(" ".join)


def kept(days: float, recalls: int) -> float:
    return float(retention(int(days * DAY_MS), np.array([0]), np.array([recalls]))[0])


def test_retention_is_the_forgetting_curve_of_days_and_strength() -> None:
    assert kept(0, 0) == 1.0
    assert kept(5, 0) == pytest.approx(math.exp(-1))
    assert kept(5, 1) == pytest.approx(math.exp(-1 / 2))
    assert kept(-3, 0) == 1.0  # another machine's clock


@given(days=st.floats(0.1, 300), recalls=st.integers(0, 50), more=st.integers(1, 50))
def test_strength_slows_forgetting(days: float, recalls: int, more: int) -> None:
    assert kept(days, recalls + more) > kept(days, recalls)
    assert kept(days + 1, recalls) < kept(days, recalls)
    assert kept(days, recalls) > math.exp(-days / 5 * (1 + recalls)) or recalls == 0  # the published slip


def reference(texts: list[str], query: str, k1: float = 1.2, b: float = 0.75) -> list[float]:
    """BM25 as it is written down, one text after the other."""
    split = [Counter(words(text)) for text in texts]
    mean = sum(counts.total() for counts in split) / len(split)
    scores = []
    for counts in split:
        total = 0.0
        for word in words(query):
            having = sum(word in other for other in split)
            idf = math.log(1 + (len(split) - having + 0.5) / (having + 0.5))
            total += idf * counts[word] * (k1 + 1) / (counts[word] + k1 * (1 - b + b * counts.total() / mean))
        scores.append(total)
    return scores


@given(texts=st.lists(WORDS, min_size=1, max_size=12), query=WORDS, data=st.data())
def test_bm25_is_okapis_whatever_came_and_went(texts: list[str], query: str, data: st.DataObject) -> None:
    index = Bm25()
    for text in texts:
        index.add(text)
    np.testing.assert_allclose(index.scores(query), reference(texts, query), rtol=1e-5)
    alive = np.array(data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts))))
    left = index.without(alive)
    left.add("cat cat bee")
    texts = [text for text, stays in zip(texts, alive, strict=True) if stays] + ["cat cat bee"]
    np.testing.assert_allclose(left.scores(query), reference(texts, query), rtol=1e-5)


def test_words_have_no_case_and_one_form() -> None:
    assert words("Straße, ﬁre: ½-Pound_x!") == ["strasse", "fire", "1", "2", "pound_x"]
    assert Bm25().scores("anything").tolist() == []


@given(st.permutations(range(6)), st.permutations(range(6)))
def test_fused_ranks_order_as_reciprocal_ranks_do(first: list[int], second: list[int]) -> None:
    both = fused([np.array(first), np.array(second)], 6, depth=200)
    plain = [1 / (61 + first.index(row)) + 1 / (61 + second.index(row)) for row in range(6)]
    assert np.argsort(-both, kind="stable").tolist() == np.argsort(-np.round(plain, 12), kind="stable").tolist()
    assert ((both >= 0) & (both <= 1)).all()


def test_the_first_of_all_rankings_has_one_and_what_is_in_none_has_nothing() -> None:
    both = fused([np.array([2, 0]), np.array([2, 1])], 4, depth=200)
    assert both[2] == 1.0
    assert both[3] == 0.0
    assert both[0] == both[1] < 0.5
    assert fused([np.array([1]), np.array([], int)], 2, depth=200).tolist() == [0.0, 1.0]
    assert fused([np.array([], int)], 2, depth=200).tolist() == [0.0, 0.0]


UNIT = st.floats(0, 1)


@given(relevance=UNIT, retained=UNIT, importance=UNIT, weights=st.tuples(UNIT, UNIT, UNIT))
def test_a_score_is_between_what_it_is_made_of(
    relevance: float, retained: float, importance: float, weights: tuple[float, float, float]
) -> None:
    settings = BankSettings(relevance_weight=weights[0], recency_weight=weights[1], importance_weight=weights[2])
    [total] = score(settings, np.array([relevance]), np.array([retained]), np.array([importance]))
    parts = (relevance, retained, importance)
    assert min(parts) - 1e-9 <= total <= max(parts) + 1e-9


def test_importance_and_recency_decide_between_what_is_as_relevant() -> None:
    settings = BankSettings(recency_weight=0.25, importance_weight=0.25)
    relevance = np.array([0.9, 0.9, 0.9])
    scores = score(settings, relevance, np.array([1.0, 0.2, 0.2]), np.array([0.5, 0.5, 1.0]))
    assert np.argsort(-scores).tolist() == [0, 2, 1]
    only = score(BankSettings(relevance_weight=0, recency_weight=0, importance_weight=0), relevance, scores, scores)
    assert only.tolist() == relevance.tolist()


def test_what_is_like_the_best_comes_after_what_is_not() -> None:
    scores = np.array([1.0, 0.95, 0.6])
    vectors = np.array([[1.0, 0.0], [0.99, 0.141], [0.0, 1.0]], np.float32)
    assert diverse(scores, vectors, 3, 1.0) == [0, 1, 2]
    assert diverse(scores, vectors, 3, 0.5) == [0, 2, 1]
    assert diverse(scores, vectors, 2, 0.5) == [0, 2]
    assert diverse(np.zeros(0), np.zeros((0, 0), np.float32), 2, 0.5) == []


@given(st.lists(st.sampled_from([-np.inf, 0.0, 0.25, 0.5, 1.0]), max_size=30), st.integers(1, 30))
def test_the_best_come_first_and_equals_in_their_order(values: list[float], most: int) -> None:
    order = sorted((place for place, value in enumerate(values) if value > -np.inf), key=lambda place: -values[place])
    assert best_first(np.array(values), most).tolist() == order[:most]
