"""The command `atomas data` as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from atomas.cli import main
from atomas.data.shards import Corpus

PAIRS = "smiles\ttext\nCCO\tethanol\nCC\tethane\nC\tmethane\nCCC\tpropane\n"


def run(*args: object) -> None:
    main(["data", *(str(arg) for arg in args)])


def fail(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    with pytest.raises(SystemExit) as caught:
        run(*args)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "command", [("verify",), ("tokenize", "--tokenizer", "t5"), ("index",), ("leakage", "--against", "x")]
)
def test_no_workers_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    name, *rest = command
    assert "--workers -1: at least 1 is needed" in fail(capsys, name, tmp_path, *rest, "--workers", -1)


def test_build_and_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pairs.tsv").write_text(PAIRS)
    run("build", tmp_path / "pairs.tsv", "--out", tmp_path / "corpus", "--fractions", "train=0.5,test=0.5")
    printed = capsys.readouterr().out
    assert "Splits" in printed
    assert "not_canonical" not in printed
    assert str(tmp_path / "corpus") in printed
    run("inspect", tmp_path / "corpus", "--samples", 1)
    assert "test[0]" in capsys.readouterr().out
    assert set(Corpus.open(tmp_path / "corpus").splits) == {"train", "test"}


def test_named_splits(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.tsv").write_text(PAIRS)
    splits = [f"train={tmp_path}/a.tsv", f"train={tmp_path}/b.tsv", f"validation={tmp_path}/c.tsv"]
    run("build", "--split", *splits, "--out", tmp_path / "corpus")
    corpus = Corpus.open(tmp_path / "corpus")
    assert {name: split.num_records for name, split in corpus.splits.items()} == {"train": 8, "validation": 4}


def test_mistakes_are_one_line_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "pairs.tsv", tmp_path / "corpus"
    source.write_text(PAIRS)
    assert "no input" in fail(capsys, "build", "--out", out)
    assert "write --split NAME=" in fail(capsys, "build", source, "--split", f"test={source}", "--out", out)
    assert "write NAME=VALUE" in fail(capsys, "build", "--split", source, "--out", out)
    assert "write NAME=VALUE" in fail(capsys, "build", "--split", f"../x={source}", "--out", out)
    assert "not a number" in fail(capsys, "build", source, "--fractions", "train=x", "--out", out)
    assert "twice" in fail(capsys, "build", source, "--fractions", "train=.5,train=.5", "--out", out)
    wrong = ["build", source, "--out", out, "--text-column", "caption"]
    assert "columns are 'smiles', 'text': name one with --text-column" in fail(capsys, *wrong)
    assert "not a built corpus" in fail(capsys, "inspect", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.tsv"]


@pytest.mark.parametrize("command", ["build", "verify", "inspect", "fetch", "demo"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(command, "--help")
    assert caught.value.code == 0
    assert f"atomas data {command}" in capsys.readouterr().out.split("xample", 1)[1]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom atomas.cli import main\ntry: main(['data', 'build', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('rdkit', 'numpy', 'pyarrow', 'requests', 'torch', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_log_without_a_terminal_has_no_bars(tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text(PAIRS)
    command = [sys.executable, "-m", "atomas", "data", "build", "pairs.tsv", "--out", "corpus"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    assert done.stderr == ""
    assert "\r" not in done.stdout
    assert "\x1b" not in done.stdout
