"""Molecule metrics: the published scripts' values, hand-counted rows, and what is null."""

import json
from pathlib import Path

import numpy as np
import pytest

from atomas.metrics.chemnet import fcd_is_installed
from atomas.metrics.molecules import METRICS, score_molecules
from atomas.metrics.resampling import Bootstrap
from atomas.metrics.scores import Scores
from atomas.tasks.prediction_file import read_predictions

FAST = Bootstrap(resamples=20)


def values(references: list[str], outputs: list[str]) -> dict[str, float | None]:
    scores = score_molecules(references, outputs, bootstrap=FAST)
    return {name: score.value for name, score in scores.metrics.items()}


def score_file(folder: Path, name: str, workers: int) -> tuple[Scores, dict[str, float]]:
    rows = read_predictions(folder / name, "molecule").rows
    scores = score_molecules([row.reference for row in rows], [row.output for row in rows], workers=workers)
    wanted = json.loads((folder / "reference_values.json").read_text())[name]
    return scores, wanted


def test_published_values(shared_data: Path) -> None:
    scores, wanted = score_file(shared_data / "predictions", "caption2smiles_example.txt", workers=1)
    metrics = scores.as_json()["metrics"]
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, abs=1e-3)


@pytest.mark.slow
def test_published_values_of_a_whole_split(shared_data: Path) -> None:
    scores, wanted = score_file(shared_data / "predictions", "molt5-small-caption2smiles.txt", workers=2)
    metrics = scores.as_json()["metrics"]
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, abs=1e-3)
    for name, score in scores.metrics.items():
        if name != "fcd":
            assert score.interval is not None
            assert score.interval[0] < score.value < score.interval[1]


def test_perfect_molecules_however_written() -> None:
    found = values(["OCC", "c1ccccc1"], ["CCO", "C1=CC=CC=C1"])
    assert found["exact"] == found["validity"] == found["maccs"] == found["rdk"] == found["morgan"] == 1.0
    assert found["levenshtein"] == pytest.approx((2 + 9) / 2)
    assert found["bleu"] is not None
    assert found["bleu"] < 1.0  # strings are compared as written


def test_stereo_counts_in_exact_and_not_in_fingerprints() -> None:
    found = values(["C[C@H](N)C(=O)O"], ["C[C@@H](N)C(=O)O"])
    assert found["exact"] == 0.0
    assert found["morgan"] == 1.0


def test_an_invalid_output_is_no_molecule_and_no_similarity() -> None:
    found = values(["CCO", "CCN"], ["CCO", "C1CC("])
    assert found["validity"] == found["validity_transl"] == found["validity_fp"] == 0.5
    assert found["exact"] == 0.5
    assert found["maccs"] == 1.0  # over the rows that parse


def test_an_empty_output_is_a_failure() -> None:
    """RDKit parses "": the published scripts count it as valid and unlike everything."""
    found = values(["CCO", "CCN"], ["CCO", ""])
    assert found["validity"] == 0.5
    assert found["validity_transl"] == found["validity_fp"] == 1.0
    assert found["exact"] == found["maccs"] == found["rdk"] == found["morgan"] == 0.5
    assert found["levenshtein"] == 1.5
    assert score_molecules(["CCO"], [""], bootstrap=FAST).details["empty_outputs"] == 1


def test_text_behind_a_molecule_is_not_valid() -> None:
    found = values(["CCO"], ["CCO is ethanol"])
    assert (found["validity"], found["validity_fp"]) == (0.0, 1.0)


def test_doubled_backslashes_are_the_same_molecule_and_another_string() -> None:
    found = values([r"F/C=C\\F"], [r"F/C=C\F"])
    assert found["exact"] == 1.0
    assert found["levenshtein"] == 1.0


def test_a_reference_that_rdkit_refuses_is_counted_and_skipped() -> None:
    scores = score_molecules(["O=Cl(=O)(=O)F", "CCO"], ["CCO", "CCO"], bootstrap=FAST)
    assert scores.details["invalid_references"] == 1
    assert scores.metrics["validity_transl"].value == 0.5
    assert scores.metrics["validity_fp"].value == 1.0
    assert scores.metrics["maccs"].value == 1.0


def test_molecules_without_inchi_are_told() -> None:
    scores = score_molecules(["*CC", "*CC"], ["*CC", "*CCO"], bootstrap=FAST)
    assert scores.metrics["exact"].value == 1.0  # as published: no InChI equals no InChI
    assert scores.details["exact_without_inchi"] == 2


def test_without_any_molecule_similarities_are_null_with_a_reason() -> None:
    scores = score_molecules(["CCO", "CCN"], ["C(", "not one"], bootstrap=FAST)
    assert scores.metrics["validity"].value == 0.0
    for name in ("maccs", "rdk", "morgan", "fcd"):
        assert scores.metrics[name].value is None
        assert scores.metrics[name].reason


def test_fcd_is_null_with_a_reason_where_its_weights_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atomas.metrics.chemnet.fcd_is_installed", lambda: False)
    score = score_molecules(["CCO", "CCN"], ["CCO", "CCN"], bootstrap=FAST).metrics["fcd"]
    assert score.value is None
    assert "ChemNet" in score.reason


@pytest.mark.skipif(not fcd_is_installed(), reason="needs the package fcd (extra 'fcd')")
def test_fcd_of_equal_and_of_other_molecules() -> None:
    molecules = ["C" * length + "O" for length in range(1, 12)]
    others = ["c1ccccc1" + "N" * (length % 3) for length in range(1, 12)]
    same, different = (
        score_molecules(molecules, outputs, bootstrap=FAST).metrics["fcd"].value
        for outputs in (molecules, others)
    )
    assert same == pytest.approx(0.0, abs=1e-2)
    assert different is not None
    assert different > 1.0


def test_workers_change_nothing_and_the_order_is_kept() -> None:
    references = ["C" * (1 + number % 7) + "O" for number in range(150)]
    outputs = ["C" * (1 + number % 5) + "N" * (number % 2) for number in range(150)]
    alone = score_molecules(references, outputs, bootstrap=FAST)
    shared = score_molecules(references, outputs, bootstrap=FAST, workers=2)
    assert alone == shared
    assert tuple(alone.metrics) == METRICS


def test_intervals_of_molecules_are_scoring_every_resample_again() -> None:
    references = ["CCO", "CCN", "c1ccccc1", "CC(=O)O", "C[C@H](N)C(=O)O"]
    outputs = ["CCO", "CC", "c1ccccc1O", "CC(", "CC(N)C(=O)O"]
    bootstrap = Bootstrap(resamples=25, seed=5)
    scores = score_molecules(references, outputs, bootstrap=bootstrap)
    rng = np.random.default_rng(5)
    again: list[dict[str, float | None]] = []
    for _ in range(25):
        drawn = rng.integers(0, 5, 5)
        again.append(values([references[i] for i in drawn], [outputs[i] for i in drawn]))
    for name in METRICS:
        if name != "fcd":
            wanted = np.nanpercentile([np.nan if v[name] is None else v[name] for v in again], [2.5, 97.5])
            np.testing.assert_allclose(scores.metrics[name].interval, wanted, atol=1e-12, err_msg=name)


def test_lists_must_be_equally_long() -> None:
    with pytest.raises(ValueError, match="1 references and 2 outputs"):
        score_molecules(["C"], ["C", "C"])
    with pytest.raises(ValueError, match="equally many"):
        score_molecules([], [])
