"""Retrieval metrics that are fair to ties and duplicates.

What counts as right for query i: every candidate that is the same molecule (InChIKey) or has the same text as row i;
a corpus with one caption for thirteen molecules would otherwise punish a correct answer twelve times in thirteen.
Candidates that score exactly alike come in random order: metrics are expectations over that order, so that a
model which scores everything alike gets chance, not 100 % and not 0.
"""

import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from atomas.errors import AtomasError


@dataclass(frozen=True, kw_only=True)
class RankingMetrics:
    """Of one direction; recalls and mrr are in [0, 1], ranks count from 1."""

    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    mrr: float
    median_rank: float
    strict_recall_at_1: float
    """Only the row's own partner counts, and a tie is lost: a lower bound, comparable with any published count."""
    tied_queries: int
    """Queries whose best right candidate scores exactly as some wrong one."""

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def ranking_metrics(scores: NDArray[np.floating], relevant: NDArray[np.bool_]) -> RankingMetrics:
    """Metrics of all queries.

    Args:
        scores: [n_queries, n_candidates], higher is better, finite; the own partner of query i is candidate i.
        relevant: bool, same shape; must be True on the diagonal.

    Raises:
        ValueError: shapes differ, or there are fewer candidates than queries.
        AtomasError: a score is not finite.
    """
    if scores.shape != relevant.shape or scores.ndim != 2 or scores.shape[0] > scores.shape[1]:
        raise ValueError(
            f"scores {scores.shape} and relevant {relevant.shape} must be alike, queries <= candidates"
        )
    if not np.isfinite(scores).all():
        raise AtomasError(
            "the model's scores hold NaN or infinity: its weights have diverged; use an older checkpoint"
        )
    best = np.where(relevant, scores, -np.inf).max(axis=1, keepdims=True)
    greater = ((scores > best) & ~relevant).sum(axis=1)
    tied_wrong = ((scores == best) & ~relevant).sum(axis=1)
    tied_right = ((scores == best) & relevant).sum(axis=1)
    triples = list(zip(greater.tolist(), tied_wrong.tolist(), tied_right.tolist(), strict=True))
    own = scores.diagonal()[:, None]
    others_at_least = (scores >= own).sum(axis=1) - 1
    return RankingMetrics(
        recall_at_1=_mean([_recall(1, *t) for t in triples]),
        recall_at_5=_mean([_recall(5, *t) for t in triples]),
        recall_at_10=_mean([_recall(10, *t) for t in triples]),
        mrr=_mean([_reciprocal(*t) for t in triples]),
        median_rank=float(np.median(greater + 1 + tied_wrong / (tied_right + 1))),
        strict_recall_at_1=float((others_at_least == 0).mean()),
        tied_queries=int((tied_wrong > 0).sum()),
    )


def relevance(molecule_id: NDArray[np.int64], text_id: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[n, n]: rows that are the same molecule or carry the same text."""
    return (molecule_id[:, None] == molecule_id[None]) | (text_id[:, None] == text_id[None])


def _recall(k: int, greater: int, wrong: int, right: int) -> float:
    """Chance that one of `right` is among the first k, after `greater` and mixed with `wrong` equals."""
    places = k - greater
    if places <= 0:
        return 0.0
    if places > wrong:
        return 1.0
    return 1.0 - math.comb(wrong, places) / math.comb(wrong + right, places)


def _reciprocal(greater: int, wrong: int, right: int) -> float:
    """Expected 1 / rank of the first right candidate."""
    total, before = 0.0, 1.0  # before: chance that no right one has come yet
    for place in range(wrong + 1):
        here = before * right / (wrong + right - place)
        total += here / (greater + 1 + place)
        before -= here
    return total


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))
