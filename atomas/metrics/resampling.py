"""Percentile bootstrap of metrics that are functions of sums over rows.

Corpus BLEU is one (of its n-gram counts), a mean is one (of values and ones): a resample of the rows changes the
weights in the sums, and nothing is scored again. One draw serves all metrics, so that their intervals belong together.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BLOCK_ENTRIES = 4_000_000  # weights held at once: 32 MB


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """How intervals are found; the same settings and rows give the same intervals."""

    resamples: int = 1000
    level: float = 0.95
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class RowStatistic:
    """A metric of a set of rows.

    `rows` is float64 [n, k]; `combine` turns sums over rows, [..., k], into values [...] (NaN where undefined).
    """

    rows: NDArray[np.float64]
    combine: Callable[[NDArray[np.float64]], NDArray[np.float64]]

    def value(self) -> float:
        """Of all rows, each once."""
        return float(self.combine(self.rows.sum(axis=0)))


def mean_over(values: NDArray[np.float64], where: NDArray[np.bool_] | None = None) -> RowStatistic:
    """The mean of `values` [n] over the rows that `where` [n] marks (default: all)."""
    marks = np.ones(len(values)) if where is None else where.astype(np.float64)
    return RowStatistic(rows=np.stack([np.where(marks > 0, values, 0.0), marks], axis=1), combine=_ratio)


def bootstrap_intervals(
    statistics: Mapping[str, RowStatistic], bootstrap: Bootstrap
) -> dict[str, tuple[float, float]]:
    """Lower and upper percentile of every statistic over resamples of the rows, drawn with replacement.

    Resamples in which a statistic is undefined (no valid molecule drawn) do not count for it.
    """
    if not statistics:
        return {}
    columns = np.concatenate([statistic.rows for statistic in statistics.values()], axis=1)
    sums = _resampled_sums(columns, bootstrap)
    percentiles = [50 * (1 - bootstrap.level), 50 * (1 + bootstrap.level)]
    intervals, start = {}, 0
    for name, statistic in statistics.items():
        width = statistic.rows.shape[1]
        low, high = np.nanpercentile(statistic.combine(sums[:, start : start + width]), percentiles)
        intervals[name] = (float(low), float(high))
        start += width
    return intervals


def _resampled_sums(columns: NDArray[np.float64], bootstrap: Bootstrap) -> NDArray[np.float64]:
    """[resamples, k]: sums of `columns` [n, k] over each resample."""
    n = len(columns)
    rng = np.random.default_rng(bootstrap.seed)
    sums = np.empty((bootstrap.resamples, columns.shape[1]))
    block = max(1, _BLOCK_ENTRIES // n)
    for start in range(0, bootstrap.resamples, block):
        stop = min(start + block, bootstrap.resamples)
        weights = [np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(start, stop)]
        sums[start:stop] = np.stack(weights).astype(np.float64) @ columns
    return sums


def _ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        quotient: NDArray[np.float64] = sums[..., 0] / sums[..., 1]
    return quotient
