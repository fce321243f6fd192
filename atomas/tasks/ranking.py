"""Retrieval metrics that are fair to ties and duplicates.

What counts as right for query i: every candidate that is the same molecule (InChIKey) or has the same text as row i;
a corpus with one caption for thirteen molecules would otherwise punish a correct answer twelve times in thirteen.
Candidates that score exactly alike come in random order: metrics are expectations over that order, so that a
model which scores everything alike gets chance, not 100 % and not 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from atomas.errors import AtomasError
from atomas.metrics.resampling import Bootstrap, bootstrap_intervals, mean_over


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
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Of recalls and mrr over resamples of the queries, where they were asked for."""

    def as_dict(self) -> dict[str, float]:
        """The numbers for JSON, without intervals."""
        values = asdict(self)
        del values["intervals"]
        return values


@dataclass(frozen=True, kw_only=True)
class RankCounts:
    """What the metrics of n queries need to know of their candidates, however many those are. All [n] int64."""

    greater: NDArray[np.int64]
    """wrong candidates that score above the best right one"""
    tied_wrong: NDArray[np.int64]
    """wrong ones that score as it does"""
    tied_right: NDArray[np.int64]
    """right ones that score as it does, itself included"""
    rivals: NDArray[np.int64]
    """candidates, right or wrong, that score at least as the row's own partner"""

    @classmethod
    def of(
        cls, scores: NDArray[np.floating], relevant: NDArray[np.bool_], own: NDArray[np.integer]
    ) -> "RankCounts":
        """Count for some queries.

        Args:
            scores: [n, candidates], higher is better, finite.
            relevant: bool, same shape; True for the own partner.
            own: [n], column of the own partner.

        Raises:
            AtomasError: a score is not finite.
        """
        if not np.isfinite(scores).all():
            raise AtomasError(
                "the model's scores hold NaN or infinity: its weights have diverged; use an older checkpoint"
            )
        best = np.where(relevant, scores, -np.inf).max(axis=1, keepdims=True)
        of_own = np.take_along_axis(scores, own[:, None], axis=1)
        return cls(
            greater=((scores > best) & ~relevant).sum(axis=1),
            tied_wrong=((scores == best) & ~relevant).sum(axis=1),
            tied_right=((scores == best) & relevant).sum(axis=1),
            rivals=(scores >= of_own).sum(axis=1) - 1,
        )

    @classmethod
    def concatenate(cls, parts: Sequence["RankCounts"]) -> "RankCounts":
        """Those of all queries of `parts`."""
        names = ("greater", "tied_wrong", "tied_right", "rivals")
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def metrics(self, bootstrap: Bootstrap | None = None) -> RankingMetrics:
        """Means over the queries, with intervals if a `bootstrap` is given."""
        triples = list(
            zip(self.greater.tolist(), self.tied_wrong.tolist(), self.tied_right.tolist(), strict=True)
        )
        of_query = {
            "recall_at_1": [_recall(1, *t) for t in triples],
            "recall_at_5": [_recall(5, *t) for t in triples],
            "recall_at_10": [_recall(10, *t) for t in triples],
            "mrr": [_reciprocal(*t) for t in triples],
            "strict_recall_at_1": (self.rivals == 0).astype(float).tolist(),
        }
        intervals = {}
        if bootstrap is not None:
            statistics = {name: mean_over(np.array(values)) for name, values in of_query.items()}
            intervals = bootstrap_intervals(statistics, bootstrap)
        return RankingMetrics(
            **{name: sum(values) / max(1, len(values)) for name, values in of_query.items()},
            median_rank=float(np.median(self.greater + 1 + self.tied_wrong / (self.tied_right + 1))),
            tied_queries=int((self.tied_wrong > 0).sum()),
            intervals=intervals,
        )


def ranking_metrics(scores: NDArray[np.floating], relevant: NDArray[np.bool_]) -> RankingMetrics:
    """Metrics of all queries at once.

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
    return RankCounts.of(scores, relevant, np.arange(len(scores))).metrics()


def relevance(
    molecule_id: NDArray[np.int64], text_id: NDArray[np.int64], rows: slice = slice(None)
) -> NDArray[np.bool_]:
    """[some rows, n]: rows that are the same molecule or carry the same text."""
    return (molecule_id[rows, None] == molecule_id) | (text_id[rows, None] == text_id)


def _recall(k: int, greater: int, wrong: int, right: int) -> float:
    """Chance that one of `right` is among the first k, after `greater` and mixed with `wrong` equals."""
    places = k - greater
    if places <= 0:
        return 0.0
    if places > wrong:
        return 1.0
    return 1.0 - math.comb(wrong, places) / math.comb(wrong + right, places)


@lru_cache  # where a collapsed model scores everything alike, all queries have the same sum of n terms
def _reciprocal(greater: int, wrong: int, right: int) -> float:
    """Expected 1 / rank of the first right candidate."""
    total, before = 0.0, 1.0  # before: chance that no right one has come yet
    for place in range(wrong + 1):
        here = before * right / (wrong + right - place)
        total += here / (greater + 1 + place)
        before -= here
    return total
