"""`atomas evaluate predictions` and `merge`: from the command line to the report."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from atomas.cli import main
from atomas.metrics.molecules import score_molecules
from atomas.metrics.resampling import Bootstrap
from atomas.tasks.prediction_file import write_predictions

MOLECULES = [
    ("an alcohol", "CCO", "CCO"),
    ("a primary amine", "CCN", "CNC"),
    ("an aromatic ring", "c1ccccc1", ""),
    ('an odd " quote', "CC(=O)O", "CC(=O"),
    ("a double bond", r"F/C=C\F", "F/C=C/F"),
    ("a salt", "[Na+].[Cl-]", "[Na+].[Cl-]"),
]


def evaluate(*arguments: object) -> None:
    main(["evaluate", *(str(argument) for argument in arguments)])


def score(folder: Path, rows: list[tuple[str, str, str]], name: str = "report.json", seed: int = 0) -> Any:
    file = folder / f"{name}.tsv"
    write_predictions(file, "molecule", rows)
    report = folder / name
    evaluate("predictions", file, "--task", "molecule", "--seed", seed, "--workers", 1, "--report", report)
    return json.loads(report.read_text())


def test_a_report_names_what_it_was_made_from(tmp_path: Path) -> None:
    report = score(tmp_path, MOLECULES, seed=4)
    content = (tmp_path / "report.json.tsv").read_bytes()
    assert report["task"] == "molecule"
    assert report["file"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert report["versions"]["rdkit"] == version("rdkit")
    assert report["bootstrap"] == {"method": "percentile", "resamples": 1000, "level": 0.95, "seed": 4}
    assert (report["rows"], report["metrics"]["n"]) == (6, 6)
    assert (report["empty_outputs"], report["irregular_lines"]) == (1, 0)
    assert report["first_lines"]["empty_outputs"] == [4]


def test_a_report_holds_the_numbers_of_the_functions(tmp_path: Path) -> None:
    report = score(tmp_path, MOLECULES)
    _, references, outputs = zip(*MOLECULES, strict=True)
    direct = score_molecules(references, outputs, bootstrap=Bootstrap()).as_json()
    for key in ("metrics", "intervals", "reasons", "versions"):
        assert report[key] == direct[key]
    for name, interval in report["intervals"].items():
        assert (interval is None) == (name == "fcd")


def test_hazards_change_the_counts_and_not_the_other_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = score(tmp_path, MOLECULES)
    lines = (tmp_path / "report.json.tsv").read_bytes().splitlines()
    lines[4] = lines[4].replace(b"odd ", b"odd \t")
    lines[3] = lines[3].rstrip(b"\t")
    hazardous = tmp_path / "hazardous.txt"
    hazardous.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([*lines[:2], b"", *lines[2:], b"stray text", b""]))
    report = tmp_path / "hazardous.json"
    capsys.readouterr()
    evaluate("predictions", hazardous, "--task", "molecule", "--workers", 1, "--report", report)
    found = json.loads(report.read_text())
    for key in ("metrics", "intervals", "rows", "empty_outputs", "references_sha256"):
        assert found[key] == clean[key]
    assert (found["irregular_lines"], found["left_out_lines"]) == (4, 2)
    assert [line["line"] for line in found["first_lines"]["irregular_lines"]] == [3, 5, 6, 9]
    shown = capsys.readouterr().out
    assert "line 3: empty line: left out" in shown
    assert "line 9: no ground truth: left out" in shown


def test_captions_by_the_shared_tokenizer(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATOMAS_SHARED", str(shared_data.parent))
    file = shared_data / "predictions" / "smiles2caption_example.txt"
    report = tmp_path / "report.json"
    evaluate("predictions", file, "--task", "caption", "--report", report)
    found = json.loads(report.read_text())
    wanted = json.loads((file.parent / "reference_values.json").read_text())[file.name]
    assert {name: found["metrics"][name] for name in wanted} == pytest.approx(wanted, abs=1e-3)
    assert found["tokenizer"]["name"] == "allenai/scibert_scivocab_uncased"
    assert found["versions"]["rdkit"] == version("rdkit")


def test_reports_of_seeds_are_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = score(tmp_path, MOLECULES, "first.json")
    improved = [(text, reference, reference) for text, reference, _ in MOLECULES[:3]] + MOLECULES[3:]
    second = score(tmp_path, improved, "second.json")
    merged = tmp_path / "merged.json"
    evaluate("merge", tmp_path / "first.json", tmp_path / "second.json", "--out", merged)
    exact = json.loads(merged.read_text())["metrics"]["exact"]
    assert exact["values"] == [first["metrics"]["exact"], second["metrics"]["exact"]]
    assert exact["mean"] == pytest.approx(sum(exact["values"]) / 2)
    assert "mean over 2 reports" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predictions", "FILE", "--task", "caption"], "its predictions are of --task molecule"),
        (["predictions", "nothing.txt", "--task", "molecule"], "cannot read nothing.txt"),
        (["predictions", "FILE", "--task", "molecule", "--report", "no/report.json"], "does not exist"),
        (["predictions", "FILE", "--task", "molecule", "--tokenizer", "t5"], "--task caption"),
        (["predictions", "FILE", "--task", "molecule", "--resamples", "0"], "--resamples 0"),
        (["predictions", "FILE", "--task", "molecule", "--seed", "-1"], "--seed -1"),
        (["predictions", "FILE", "--task", "molecule", "--workers", "0"], "--workers 0"),
        (["merge", "FILE", "nothing.json"], "is no JSON"),
        (["merge", "nothing.json", "FILE"], "cannot read nothing.json"),
        (["merge", "FILE", "FILE"], "is given twice"),
        (["merge", "FILE", "nothing.json", "--out", "no/merged.json"], "does not exist"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    file = tmp_path / "predictions.tsv"
    write_predictions(file, "molecule", MOLECULES)
    with pytest.raises(SystemExit) as raised:
        evaluate(*(str(file) if argument == "FILE" else argument for argument in arguments))
    assert raised.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    file = tmp_path / "predictions.tsv"
    write_predictions(file, "molecule", [("an alkane", "C" * 60, "C" * 61)] * 20_000)
    command = [sys.executable, "-m", "atomas", "evaluate", "predictions", str(file), "--task", "molecule"]
    with subprocess.Popen(
        [*command, "--workers", "2", "--report", str(tmp_path / "report.json")],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        assert "scoring molecules" in process.stderr.readline()  # the first sign of progress
        os.killpg(process.pid, signal.SIGINT)
        started = time.monotonic()
        said = process.stderr.read()
        assert process.wait() == 130
    assert time.monotonic() - started < 120
    assert "Traceback" not in said
    assert said.endswith("atomas: interrupted\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions.tsv"]


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for task in ("predictions", "merge"):
        with pytest.raises(SystemExit):
            evaluate(task, "--help")
        assert f"Example:\n  atomas evaluate {task} " in capsys.readouterr().out
