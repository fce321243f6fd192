"""Corpus BLEU from counts of single rows: what nltk's `corpus_bleu` sums up, kept apart."""

from collections.abc import Sequence

import numpy as np
from nltk.translate.bleu_score import modified_precision
from numpy.typing import NDArray

from atomas.metrics.resampling import RowStatistic

ORDERS = 4
COUNTS = 2 * ORDERS + 2
"""Numbers that `bleu_counts` gives for a row."""


def bleu_counts(reference: Sequence[str], output: Sequence[str]) -> list[int]:
    """Matched n-grams and n-grams of the output (n = 1 .. 4), tokens of the output and of the reference.

    As in nltk an output without n-grams counts one that is not matched.
    """
    precisions = [modified_precision([reference], output, n) for n in range(1, ORDERS + 1)]
    return [
        *(precision.numerator for precision in precisions),
        *(precision.denominator for precision in precisions),
        len(output),
        len(reference),
    ]


def bleu_statistic(counts: NDArray[np.float64], order: int) -> RowStatistic:
    """BLEU with uniform weights up to n-grams of `order`, of the rows' `counts` [n, COUNTS]; no smoothing."""
    used = [*range(order), *range(ORDERS, ORDERS + order), COUNTS - 2, COUNTS - 1]

    def combine(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        matched, total = sums[..., :order], sums[..., order : 2 * order]
        output_length, reference_length = sums[..., -2], sums[..., -1]
        with np.errstate(divide="ignore"):
            log_precision = np.log(matched / total).mean(axis=-1)
        brevity = np.minimum(0.0, 1.0 - reference_length / np.maximum(output_length, 1e-9))
        bleu: NDArray[np.float64] = np.exp(log_precision + brevity)
        return bleu

    return RowStatistic(rows=counts[:, used], combine=combine)
