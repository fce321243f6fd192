"""The grounding score: hand-made cases with known answers, and the command."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atomas.cli import main
from atomas.data.demo import build_demo_corpus
from atomas.interpretation.correspondence import LevelCorrespondence, PairCorrespondence, SequenceClusters
from atomas.tasks import grounding
from tests.small_checkpoint import write_small

SMILES, TEXT = "OCCN", "alcohol and amine"
WORDS, ATOMS = [(0, 7), (8, 11), (12, 17), (17, 17)], [(0, 1), (1, 2), (2, 3), (3, 4), (4, 4)]
RECORD = {
    "smiles": SMILES,
    "text": TEXT,
    "grounding": [{"start": 0, "end": 7, "atoms": [0, 1]}, {"start": 12, "end": 17, "atoms": [3]}],
}


def sequence(clusters: list[int], features: np.ndarray) -> SequenceClusters:
    count = max(clusters) + 1
    return SequenceClusters(
        cluster=np.array(clusters), weight=np.full(count, 1 / count, np.float32), features=features[:count]
    )


def pointing(targets: dict[int, int], smiles_clusters: list[int]) -> PairCorrespondence:
    """Word number -> the SMILES cluster that it matches exactly."""
    basis = np.eye(8, dtype=np.float32)
    words = np.stack([basis[targets.get(word, 7)] for word in range(4)])
    level = LevelCorrespondence(
        number=0, text=sequence([0, 1, 2, 3], words), smiles=sequence(smiles_clusters, basis)
    )
    return PairCorrespondence(
        text=TEXT, smiles=SMILES, text_offsets=WORDS, smiles_offsets=ATOMS, levels=[level]
    )


@pytest.mark.parametrize(
    ("targets", "clusters", "expected", "chance"),
    [
        ({0: 0, 2: 3}, [0, 1, 2, 3, 4], 1.0, (2 / 4 + 1 / 4) / 2),
        ({0: 2, 2: 0}, [0, 1, 2, 3, 4], 0.0, (2 / 4 + 1 / 4) / 2),
        ({0: 1, 2: 1}, [0, 1, 2, 3, 4], 0.5, (2 / 4 + 1 / 4) / 2),
        ({0: 4, 2: 3}, [0, 1, 2, 3, 4], 1.0, (2 / 4 + 1 / 4) / 2),  # </s> is not there to be chosen
        ({0: 0, 2: 1}, [0, 0, 1, 1, 1], 0.75, (1 / 2 + 1 / 4) / 2),  # clusters score the share of their atoms
    ],
)
def test_scores_that_are_known(
    monkeypatch: pytest.MonkeyPatch,
    targets: dict[int, int],
    clusters: list[int],
    expected: float,
    chance: float,
) -> None:
    model: Any = "model"
    untrained: Any = "untrained"
    seen = {"model": pointing(targets, clusters), "untrained": pointing({0: 3, 2: 0}, [0, 1, 2, 3, 4])}
    monkeypatch.setattr(
        grounding, "correspondences", lambda which, _, pairs, **__: [seen[which]] * len(pairs)
    )
    tokenizer: Any = None
    result = grounding.evaluate_grounding(
        model, untrained, tokenizer, [RECORD] * 3, max_text_tokens=9, batch_size=2, seed=0
    )
    assert (result.rows, result.spans, result.spans_cut) == (3, 6, 0)
    level = result.levels[0]
    assert level.accuracy.value == pytest.approx(expected)
    assert level.chance.value == pytest.approx(chance)
    assert level.untrained.value == 0.0
    assert level.above_chance.value == pytest.approx(expected - chance)
    assert level.accuracy.low == level.accuracy.high == pytest.approx(expected)  # all rows are alike


def test_intervals_hold_the_value_and_narrow_with_rows() -> None:
    generator = np.random.default_rng(1)
    widths = []
    for rows in (20, 2000):
        counts = generator.integers(1, 9, rows)
        hits = generator.binomial(counts, 0.6)
        level = grounding._level(np.stack([hits, 0.2 * counts, 0.3 * counts], axis=1), counts, seed=0)
        assert level.accuracy.low < level.accuracy.value < level.accuracy.high
        assert level.chance.value == pytest.approx(0.2)
        widths.append(level.accuracy.high - level.accuracy.low)
    assert widths[1] < widths[0] / 5
    # of 2,000 rows with 4.5 spans each, a binomial share of 0.6 has a standard error of 0.0052
    assert widths[1] == pytest.approx(2 * 1.96 * 0.0052, rel=0.25)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grounding") / "corpus"
    build_demo_corpus(folder, pairs=80, seed=5, workers=1)
    return folder


def evaluate(*arguments: object) -> int:
    with contextlib.suppress(SystemExit):
        main(["evaluate", "grounding", *map(str, arguments)])
        return 0
    return 2


def test_command(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_small(tmp_path / "checkpoint", max_tokens=512)
    file = tmp_path / "report.json"
    options = ["--checkpoint", tmp_path / "checkpoint", "--data", corpus, "--device", "cpu"]
    assert evaluate(*options, "--report", file) == 0
    assert "chance" in capsys.readouterr().out
    report = json.loads(file.read_text())
    assert report["rows"] == 8
    assert report["spans"] > 20
    assert set(report["levels"]) == {"0", "1", "2"}
    for level in report["levels"].values():
        for name in ("accuracy", "chance", "untrained"):
            assert 0 <= level[name]["low"] <= level[name]["value"] <= level[name]["high"] <= 1
        # random weights against random weights
        assert level["accuracy"]["value"] == pytest.approx(level["chance"]["value"], abs=0.2)
    # the numbers do not depend on the batch
    assert evaluate(*options, "--batch-size", 1, "--report", file) == 0
    again = json.loads(file.read_text())
    assert again["levels"]["0"]["accuracy"]["value"] == pytest.approx(
        report["levels"]["0"]["accuracy"]["value"]
    )


def test_a_corpus_without_truth_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_small(tmp_path / "checkpoint")
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text(
        "smiles\tdescription\n" + "".join(f"{'C' * n}\tA chain of {n} atoms.\n" for n in range(1, 9))
    )
    main(["data", "build", "--split", f"test={pairs}", "--out", str(tmp_path / "plain"), "--workers", "1"])
    capsys.readouterr()
    assert evaluate("--checkpoint", tmp_path / "checkpoint", "--data", tmp_path / "plain") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no grounding" in line
