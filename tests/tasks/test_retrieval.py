"""From a checkpoint to a retrieval report, through the command that a user calls."""

import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from atomas.cli import main
from atomas.data.demo import build_demo_corpus
from atomas.data.shards import Corpus
from atomas.data.stream import evaluation_batches
from atomas.errors import AtomasError
from atomas.tasks.report import _reranking
from atomas.tasks.retrieval import (
    Reranking,
    RetrievalResult,
    evaluate_all_scores,
    evaluate_retrieval,
)
from atomas.training.model_files import read_model
from tests.ranks import run_command
from tests.training.conftest import command


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("retrieval") / "corpus"
    build_demo_corpus(folder, pairs=240, seed=5, workers=1)
    return folder


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    arguments = command(corpus, runs, "run", ["--training.max_steps=3", "--momentum.coefficient=0.5"], 1)
    run_command(arguments[arguments.index("train") :], 1, runs / "stderr")
    return runs / "run"


def evaluate(*arguments: object) -> int:
    """Exit code of the command, run in this process: starting one costs seconds."""
    with contextlib.suppress(SystemExit):
        main(["evaluate", "retrieval", *map(str, arguments)])
        return 0
    return 2


def test_report(run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    assert evaluate("--checkpoint", run, "--data", corpus, "--report", file) == 0
    screen = capsys.readouterr().out
    report = json.loads(file.read_text())
    assert report["step"] == 3
    assert report["pairs"] == Corpus.open(corpus).split("test").num_records
    assert set(report["metrics"]) == {"global", "hierarchical", "combined"}
    for score in report["metrics"].values():
        for direction in ("text_to_molecule", "molecule_to_text"):
            values = score[direction]
            assert 0 <= values["recall_at_1"] <= values["recall_at_5"] <= values["recall_at_10"] <= 1
            assert values["recall_at_1"] <= values["mrr"]
    assert "R@1" in screen
    assert str(file) in screen


def test_scores_do_not_depend_on_batching_or_ranks(run: Path, corpus: Path) -> None:
    model, tokenizer, _ = read_model(next((run / "checkpoints").iterdir()))
    split = Corpus.open(corpus).split("test")

    def result(batch_size: int) -> np.ndarray:
        batches = evaluation_batches(split, tokenizer, batch_size=batch_size)
        found = evaluate_all_scores(model, batches, torch.device("cpu"), reranking=None)
        return np.array([[m.mrr, m.median_rank] for d in found.metrics.values() for m in d.values()])

    np.testing.assert_allclose(result(3), result(64), rtol=1e-5)


def test_reranking_everything_is_ranking_by_the_combined_score(
    run: Path, corpus: Path, tmp_path: Path
) -> None:
    model, tokenizer, _ = read_model(next((run / "checkpoints").iterdir()))
    split = Corpus.open(corpus).split("test")

    def result(reranking: Reranking | None) -> RetrievalResult:
        batches = evaluation_batches(split, tokenizer, batch_size=7)
        return evaluate_all_scores(model, batches, torch.device("cpu"), reranking=reranking)

    exhaustive = result(None)
    reranked = result(Reranking(depth=10**6, folder=tmp_path))
    assert not list(tmp_path.iterdir())
    assert set(reranked.metrics) == {"global", "reranked"}
    for direction, expected in exhaustive.metrics["combined"].items():
        found = reranked.metrics["reranked"][direction]
        assert found.mrr == pytest.approx(expected.mrr, abs=0.02)  # half precision may turn near ties
        assert reranked.metrics["global"][direction] == exhaustive.metrics["global"][direction]
    one = result(Reranking(depth=1, folder=tmp_path))
    for direction, expected in one.metrics["global"].items():
        assert (
            one.metrics["reranked"][direction].recall_at_1 == expected.recall_at_1
        )  # nothing to put in order


def test_blocks_do_not_matter(run: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, _ = read_model(next((run / "checkpoints").iterdir()))
    split = Corpus.open(corpus).split("test")
    results = []
    for entries in (1 << 24, 50):
        monkeypatch.setattr("atomas.tasks.retrieval.SCORES_PER_BLOCK", entries)
        batches = evaluation_batches(split, tokenizer, batch_size=64)
        results.append(evaluate_retrieval(model, batches, torch.device("cpu")))
    assert results[0] == results[1]


def test_rerank_option(run: Path, corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    assert evaluate("--checkpoint", run, "--data", corpus, "--rerank", 3, "--report", file) == 0
    report = json.loads(file.read_text())
    assert report["reranked_candidates"] == 3
    assert set(report["metrics"]) == {"global", "reranked"}
    assert evaluate("--checkpoint", run, "--data", corpus, "--rerank", 0) == 2


def test_a_model_without_hierarchy_cannot_rerank() -> None:
    with pytest.raises(AtomasError, match=r"--rerank 5: the model has no hierarchy"):
        _reranking(5, 40, SimpleNamespace(alignment=None), None)  # type: ignore[arg-type]


def test_momentum_weights_are_others_than_the_online_ones(run: Path) -> None:
    checkpoint = next((run / "checkpoints").iterdir())
    online = dict(read_model(checkpoint)[0].named_parameters())
    momentum = dict(read_model(checkpoint, momentum=True)[0].named_parameters())
    changed = {name for name in online if not torch.equal(online[name], momentum[name])}
    assert changed
    assert all(name.startswith("encoder.") for name in changed)


def test_mistakes_are_one_line(
    run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "run"
    shutil.copytree(run, damaged)
    weights = next((damaged / "checkpoints").iterdir()) / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, message in (
        (["--checkpoint", tmp_path / "none", "--data", corpus], "does not exist"),
        (["--checkpoint", empty, "--data", corpus], "neither a checkpoint nor a run folder"),
        (["--checkpoint", damaged, "--data", corpus], "model.safetensors has"),
        (["--checkpoint", run, "--data", corpus, "--best"], "never evaluated"),
        (["--checkpoint", run, "--data", empty], "index.json"),
        (["--checkpoint", run, "--data", corpus, "--split", "tset"], "test"),
        (["--checkpoint", run, "--data", corpus, "--report", empty / "x" / "r.json"], "does not exist"),
    ):
        assert evaluate(*arguments) == 2, arguments
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("atomas: error: ")
        assert message in line
