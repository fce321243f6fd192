"""`atomas evaluate captioning` and `generation`: every row once, on any number of ranks, also after a cut."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from atomas.cli import main
from atomas.data.shards import Corpus
from atomas.tasks.decoding import Writer
from atomas.tasks.prediction_file import read_predictions
from atomas.tasks.prediction_log import PredictionLog


def _command(task: str, checkpoint: Path, corpus: Path, report: Path, *options: str) -> list[str]:
    return [
        "evaluate", task, "--checkpoint", str(checkpoint), "--data", str(corpus), "--split", "test",
        "--report", str(report), "--max-tokens", "8", "--beams", "2", "--batch-size", "3", "--resamples", "10",
        "--device", "cpu", *options,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("task", "kind", "metric"), [("captioning", "caption", "rouge1"), ("generation", "molecule", "validity")]
)
def test_a_split_is_written_and_scored(
    task: str, kind: str, metric: str, checkpoint: Path, demo_corpus: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    main(_command(task, checkpoint, demo_corpus, report))
    numbers = json.loads(report.read_text())
    split = Corpus.open(demo_corpus).split("test")
    records = [record for block in range(len(split.blocks)) for record in split.read_block(block)]
    predictions = read_predictions(tmp_path / "report.predictions.tsv", kind).rows
    source, target = ("smiles", "text") if task == "captioning" else ("text", "smiles")
    assert [row.input for row in predictions] == [record[source] for record in records]
    assert [row.reference for row in predictions] == [record[target] for record in records]
    assert numbers["rows"] == len(records)
    assert numbers["decoding"]["beams"] == 2
    assert numbers["weights"] == "online"
    assert metric in numbers["metrics"]
    assert not (tmp_path / "report.unfinished").exists()

    scored_again = tmp_path / "again.json"
    main(["evaluate", "predictions", str(tmp_path / "report.predictions.tsv"), "--task", kind, "--resamples", "10",
          "--report", str(scored_again)])  # fmt: skip
    assert json.loads(scored_again.read_text())["metrics"] == numbers["metrics"]


def test_a_cut_run_is_continued(
    checkpoint: Path, demo_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    main(_command("generation", checkpoint, demo_corpus, whole))
    written: list[str] = []
    original = Writer.write

    def failing(self: Writer, sources: Sequence[str], *, seed: int = 0) -> list[list[str]]:
        if len(written) >= 6:
            raise KeyboardInterrupt
        written.extend(sources)
        return original(self, sources, seed=seed)

    monkeypatch.setattr(Writer, "write", failing)
    with pytest.raises(SystemExit) as stop:
        main(_command("generation", checkpoint, demo_corpus, cut))
    assert stop.value.code == 130
    log = tmp_path / "cut.unfinished" / "rank_0000.jsonl"
    with log.open("a") as file:
        file.write('{"row": 0, "outp')  # as a kill in the middle of a line leaves it

    with pytest.raises(SystemExit) as stop:  # other settings must not continue it
        main(_command("generation", checkpoint, demo_corpus, cut, "--length-penalty", "2"))
    assert stop.value.code == 2

    first = set(written)
    written.clear()

    def recording(self: Writer, sources: Sequence[str], *, seed: int = 0) -> list[list[str]]:
        written.extend(sources)
        return original(self, sources, seed=seed)

    monkeypatch.setattr(Writer, "write", recording)
    main(_command("generation", checkpoint, demo_corpus, cut))
    assert first.isdisjoint(written)
    names = ("whole.predictions.tsv", "cut.predictions.tsv")
    assert (tmp_path / names[0]).read_bytes() == (tmp_path / names[1]).read_bytes()


def test_a_line_that_was_cut_is_no_row(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    with PredictionLog(folder, {"task": "x"}, rank=0) as log:
        log.add([(1, "a\nb")])
    (folder / "rank_0000.jsonl").open("a").write('{"row": 2, "output": "half')
    with PredictionLog(folder, {"task": "x"}, rank=0) as log:
        log.add([(3, "c")])
    assert log.finished() == {1: "a\nb", 3: "c"}
    log.remove()
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_share_the_rows(sharded: bool, checkpoint: Path, demo_corpus: Path, tmp_path: Path) -> None:
    """Outputs of uneven lengths, and a last turn in which one rank has nothing left."""
    alone, shared = tmp_path / "alone.json", tmp_path / "shared.json"
    main(_command("captioning", checkpoint, demo_corpus, alone, "--max-rows", "9"))
    ranks = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "atomas",
    ]
    options = ["--max-rows", "9", *(["--shard-weights"] if sharded else [])]
    done = subprocess.run(
        [*ranks, *_command("captioning", checkpoint, demo_corpus, shared, *options)],
        capture_output=True, text=True, check=False, timeout=420,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "alone.predictions.tsv").read_bytes() == (
        tmp_path / "shared.predictions.tsv"
    ).read_bytes()
