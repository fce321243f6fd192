"""Ranking metrics against hand counts and against brute-force random tie-breaking."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atomas.errors import AtomasError
from atomas.tasks.ranking import RankCounts, ranking_metrics, relevance


def test_perfect_and_reversed() -> None:
    perfect = ranking_metrics(np.eye(12), np.eye(12, dtype=bool))
    assert (perfect.recall_at_1, perfect.mrr, perfect.median_rank, perfect.tied_queries) == (1.0, 1.0, 1.0, 0)
    worst = ranking_metrics(-np.eye(12) + 1e-6 * np.arange(12)[None], np.eye(12, dtype=bool))
    assert (worst.recall_at_10, worst.median_rank) == (0.0, 12.0)


def test_hand_counted() -> None:
    scores = np.array([[0.9, 0.1, 0.5], [0.8, 0.7, 0.1], [0.2, 0.3, 0.1]])
    metrics = ranking_metrics(scores, np.eye(3, dtype=bool))
    assert metrics.recall_at_1 == pytest.approx(1 / 3)
    assert metrics.mrr == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert metrics.median_rank == 2.0


def test_constant_scores_are_chance() -> None:
    metrics = ranking_metrics(np.zeros((20, 20)), np.eye(20, dtype=bool))
    assert metrics.recall_at_1 == pytest.approx(1 / 20)
    assert metrics.recall_at_10 == pytest.approx(10 / 20)
    assert metrics.median_rank == pytest.approx(10.5)
    assert metrics.strict_recall_at_1 == 0.0
    assert metrics.tied_queries == 20


def test_duplicates_are_right_answers() -> None:
    relevant = relevance(np.array([1, 1, 2]), np.array([7, 8, 9]))
    scores = np.array([[0.1, 0.9, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0]])
    metrics = ranking_metrics(scores, relevant)
    assert metrics.recall_at_1 == 1.0
    assert metrics.strict_recall_at_1 == pytest.approx(1 / 3)
    same_text = relevance(np.array([1, 2, 3]), np.array([7, 7, 9]))
    assert same_text.tolist() == [[True, True, False], [True, True, False], [False, False, True]]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_expectation_over_random_tie_breaks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 7))
    scores = rng.integers(0, 3, (n, n)).astype(float)
    relevant = np.eye(n, dtype=bool) | (rng.random((n, n)) < 0.2)
    metrics = ranking_metrics(scores, relevant)
    draws = 4000
    first = np.empty((draws, n))
    for draw in range(draws):
        order = np.argsort(-(scores + rng.random((n, n)) * 1e-3), axis=1)
        first[draw] = np.take_along_axis(relevant, order, axis=1).argmax(axis=1) + 1
    assert metrics.recall_at_1 == pytest.approx((first == 1).mean(), abs=0.03)
    assert metrics.recall_at_5 == pytest.approx((first <= 5).mean(), abs=0.03)
    assert metrics.mrr == pytest.approx((1 / first).mean(), abs=0.03)


def test_broken_input_is_refused() -> None:
    with pytest.raises(AtomasError, match="NaN"):
        ranking_metrics(np.full((2, 2), np.nan), np.eye(2, dtype=bool))
    with pytest.raises(ValueError, match="alike"):
        ranking_metrics(np.zeros((3, 2)), np.ones((3, 2), dtype=bool))


def test_reranked_counts_against_sorting() -> None:
    """Scores again for the nearest; everything else keeps its place behind them."""
    from atomas.tasks.reranking import _merge

    generator = np.random.default_rng(0)
    queries, candidates, depth = 40, 30, 6
    scores = generator.normal(size=(queries, candidates))
    own = generator.integers(0, candidates, queries)
    relevant = generator.random((queries, candidates)) < 0.05
    relevant[np.arange(queries), own] = True
    nearest = np.argsort(-scores, axis=1)[:, :depth]
    again = generator.integers(0, 4, (queries, depth)).astype(float)  # with ties

    whole = scores - scores.max() - 1  # below every new score, in the old order
    np.put_along_axis(whole, nearest, again, axis=1)
    expected = RankCounts.of(whole, relevant, own)
    found = _merge(RankCounts.of(scores, relevant, own), again, relevant, own, nearest)
    for name in ("greater", "tied_wrong", "tied_right", "rivals"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
