"""Sums over rows: corpus BLEU equals nltk's, and the bootstrap equals scoring every resample again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import corpus_bleu

from atomas.metrics.bleu import bleu_counts, bleu_statistic
from atomas.metrics.resampling import Bootstrap, RowStatistic, bootstrap_intervals, mean_over

TEXTS = st.lists(st.text("abc", max_size=9), min_size=1, max_size=6)


def statistic(references: list[str], outputs: list[str], order: int) -> RowStatistic:
    counts = [bleu_counts(list(r), list(o)) for r, o in zip(references, outputs, strict=True)]
    return bleu_statistic(np.array(counts, dtype=np.float64), order)


def nltk_bleu(references: list[str], outputs: list[str], order: int) -> float:
    return float(
        corpus_bleu([[list(r)] for r in references], [list(o) for o in outputs], (1 / order,) * order)
    )


@pytest.mark.filterwarnings("ignore")  # nltk's about corpora without overlap
@settings(max_examples=60, deadline=None)
@given(TEXTS, TEXTS, st.sampled_from([2, 4]))
def test_bleu_is_that_of_nltk(references: list[str], outputs: list[str], order: int) -> None:
    n = min(len(references), len(outputs))
    ours = statistic(references[:n], outputs[:n], order).value()
    assert ours == pytest.approx(nltk_bleu(references[:n], outputs[:n], order), abs=1e-9)


def test_bleu_of_known_texts() -> None:
    assert statistic(["abcdef"], ["abcdef"], 4).value() == 1.0
    assert statistic(["abcdef"], [""], 4).value() == 0.0
    assert statistic(["aaaa"], ["bbbb"], 2).value() == 0.0
    # 2 of 3 unigrams, 1 of 2 bigrams, and 3 tokens where there should be 4
    assert statistic(["abxy"], ["abz"], 2).value() == pytest.approx(
        np.sqrt(2 / 3 * 1 / 2) * np.exp(1 - 4 / 3)
    )


def test_bootstrap_is_scoring_every_resample_again() -> None:
    references = ["abcabcabc", "abccba", "aabbcc", "ccbbaa", "abababab", "cacaca", "bbbbcc"]
    outputs = ["abcabcabb", "abccbb", "aabbc", "", "babababa", "cacacaca", "ccbbbb"]
    bootstrap = Bootstrap(resamples=200, seed=3)
    found = bootstrap_intervals({"bleu": statistic(references, outputs, 4)}, bootstrap)["bleu"]

    rng = np.random.default_rng(3)
    again = []
    for _ in range(200):
        drawn = rng.integers(0, len(outputs), len(outputs))
        again.append(nltk_bleu([references[i] for i in drawn], [outputs[i] for i in drawn], 4))
    np.testing.assert_allclose(found, np.percentile(again, [2.5, 97.5]), atol=1e-12)


def test_interval_of_a_mean_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        interval = bootstrap_intervals(
            {"mean": mean_over(rng.normal(size=80))}, Bootstrap(resamples=300, seed=trial)
        )["mean"]
        covered += interval[0] <= 0.0 <= interval[1]
    assert 0.88 <= covered / 200 <= 0.99


def test_blocks_do_not_change_the_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"mean": mean_over(np.random.default_rng(1).random(50))}
    whole = bootstrap_intervals(values, Bootstrap())
    monkeypatch.setattr("atomas.metrics.resampling._BLOCK_ENTRIES", 170)
    assert bootstrap_intervals(values, Bootstrap()) == whole
    assert bootstrap_intervals(values, Bootstrap(seed=1)) != whole


def test_a_mean_over_marked_rows() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0])
    marked = mean_over(values, where=np.array([True, True, False, False]))
    assert marked.value() == 1.5
    low, high = bootstrap_intervals({"mean": marked}, Bootstrap())[
        "mean"
    ]  # some resamples have no marked row
    assert (low, high) == (1.0, 2.0)
    assert np.isnan(mean_over(values, where=np.zeros(4, dtype=bool)).value())
