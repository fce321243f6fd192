"""The data benchmark: what is timed are the corpus's own pairs, and what cannot run says why."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atomas.benchmarks.data import measurement
from atomas.benchmarks.data.measurement import ParityError, measure, open_workload, write_wanted
from atomas.benchmarks.data.providers import providers
from atomas.benchmarks.data.workload import Workload
from atomas.cli import main
from atomas.config import TokenizerConfig
from atomas.data.demo import build_demo_corpus
from atomas.data.shards import Corpus
from atomas.data.tokenizer import resolve_tokenizer
from atomas.data.tokens import tokenize_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A corpus, and the folder with its tokens."""
    directory = tmp_path_factory.mktemp("bench") / "corpus"
    build_demo_corpus(directory, pairs=60, seed=0, workers=1)
    config = TokenizerConfig(vocab_size=400)
    tokenizer = resolve_tokenizer(config, Corpus.open(directory), directory.parent / "cache")
    return directory, tokenize_corpus(directory, tokenizer)


@pytest.fixture
def workload(corpus: tuple[Path, Path], tmp_path: Path) -> Workload:
    return open_workload(corpus[0], "train", corpus[1], 16, tmp_path)


@pytest.mark.parametrize("mode", ["tokens", "text"])
@pytest.mark.parametrize("name", ["atomas", "atomas, 1 worker", "webdataset"])
def test_a_row_holds_rates_of_the_same_pairs(
    corpus: tuple[Path, Path], tmp_path: Path, mode: Any, name: str
) -> None:
    write_wanted(open_workload(corpus[0], "train", corpus[1], 16, tmp_path))
    row = measure(corpus[0], "train", corpus[1], 16, tmp_path, mode, name, 0.05, 2)
    assert row["status"] == "ok"
    rate = row["pairs_per_second"]
    assert 0 < rate["p20"] <= rate["p50"] <= rate["p80"]
    assert row["pairs"] >= 32
    assert row["own_cpu_us_per_pair"] > 0


def test_other_pairs_are_not_timed(workload: Workload) -> None:
    ours = providers()["atomas"]
    write_wanted(workload)
    measurement._check(workload, "tokens", "atomas", ours.epochs(workload, "tokens"))

    def cut() -> Any:
        for batch in ours.epochs(workload, "tokens"):
            yield replace(batch, text_id=batch.text_id + 1)

    with pytest.raises(ParityError, match="are not those of the corpus"):
        measurement._check(workload, "tokens", "atomas", cut())

    def repeated() -> Any:
        first = next(ours.epochs(workload, "tokens"))
        while True:
            yield first

    with pytest.raises(ParityError, match="gives 16 different pairs of"):
        measurement._check(workload, "tokens", "atomas", repeated())


@pytest.mark.slow
def test_the_command_reports_every_library(
    corpus: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurement, "MODES", ("tokens",))
    report = tmp_path / "report.json"
    main(["bench", "data", "--corpus", str(corpus[0]), "--tokenizer", str(corpus[1]), "--seconds", "0.05",
          "--rounds", "1", "--batch", "16", "--json", str(report)])  # fmt: skip
    content = json.loads(report.read_text())
    assert [row["provider"] for row in content["rows"]] == list(providers())
    for row in content["rows"]:
        assert row["status"] == "ok" or row["reason"]
    assert {row["status"] for row in content["rows"] if row["provider"].startswith("atomas")} == {"ok"}
    main(["bench", "render", str(report), "--out", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.md", "report.png"}
    assert "| atomas |" in (tmp_path / "out" / "report.md").read_text()
