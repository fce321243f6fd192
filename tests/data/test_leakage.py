"""Rows of evaluation sets that a training corpus holds."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from atomas.cli import main
from atomas.data.build import BuildOptions, build_corpus
from atomas.data.building.engine import Local
from atomas.data.leakage import Leak, Leakage, find_leakage
from atomas.errors import AtomasError

ONE = BuildOptions(engine=Local(workers=1))


def write_pairs(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("".join(f"{a}\t{b}\n" for a, b in [("smiles", "text"), *rows]))
    return str(path)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = [("C[C@H](N)C(=O)O", "L-alanine"), ("CCO", "an alcohol"), ("CC", "ethane")]
    build_corpus({"train": [write_pairs(tmp_path / "train.tsv", rows)]}, tmp_path / "corpus", ONE)
    return tmp_path / "corpus"


EVALUATION = [
    ("OCC", "ethanol"),
    ("C[C@@H](N)C(=O)O", "D-alanine"),
    ("CCCO", "an alcohol"),
    ("not a molecule", "ethane"),
    ("CCN", "an amine"),
    ("CC", "ethane"),
]


def test_by_molecule_skeleton_and_text(corpus: Path, tmp_path: Path) -> None:
    file = write_pairs(tmp_path / "test.tsv", EVALUATION)
    found = list(find_leakage(corpus, [file], workers=1))
    assert found == [
        Leakage(set=file, rows=5, molecule=2, skeleton=3, text=2, clean=1),
        Leak(set=file, row=2, by=("molecule", "skeleton")),
        Leak(set=file, row=3, by=("skeleton",)),
        Leak(set=file, row=4, by=("text",)),
        Leak(set=file, row=7, by=("molecule", "skeleton", "text")),
    ]


def test_in_a_temporary_folder_of_any_name(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "it's [a] *strange*; --name"
    odd.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(odd))
    file = write_pairs(tmp_path / "test.tsv", EVALUATION)
    found = next(iter(find_leakage(corpus, [file], workers=1)))
    assert found == Leakage(set=file, rows=5, molecule=2, skeleton=3, text=2, clean=1)


def test_against_a_corpus_and_a_file_without_texts(corpus: Path, tmp_path: Path) -> None:
    valid = [row for row in EVALUATION if row[0] != "not a molecule"]
    source = write_pairs(tmp_path / "test.tsv", valid)
    build_corpus({"test": [source]}, tmp_path / "evaluation", ONE)
    (tmp_path / "only.csv").write_text("smiles\nCCO\nCCCCC\n")
    sets = [str(tmp_path / "evaluation"), f"{tmp_path}/evaluation:test", f"{tmp_path}/only.csv"]
    counts = [one for one in find_leakage(corpus, sets, workers=2) if isinstance(one, Leakage)]
    assert [(one.rows, one.molecule, one.skeleton, one.text, one.clean) for one in counts] == [
        (5, 2, 3, 2, 1),
        (5, 2, 3, 2, 1),
        (2, 1, 1, 0, 1),
    ]


def test_without_skeletons_and_with_another_identity(corpus: Path, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "test.tsv", EVALUATION)
    build_corpus({"train": [source]}, tmp_path / "fast", replace(ONE, identity="smiles"))
    (counts, *_) = find_leakage(tmp_path / "fast", [source], workers=1)
    assert counts == Leakage(set=source, rows=5, molecule=5, skeleton=None, text=5, clean=0)
    with pytest.raises(AtomasError, match="built with --identity smiles, the corpus with inchikey"):
        list(find_leakage(corpus, [str(tmp_path / "fast")]))


def test_what_exclude_leaves_is_clean(corpus: Path, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "test.tsv", EVALUATION)
    out = tmp_path / "clean"
    train = write_pairs(tmp_path / "train.tsv", [("CCO", "a"), ("CCCCCC", "b"), ("C[C@H](N)C(=O)O", "c")])
    build_corpus({"train": [train]}, out, replace(ONE, exclude=(source,), exclude_by="skeleton"))
    (counts,) = find_leakage(out, [source], workers=1)
    assert isinstance(counts, Leakage)
    assert (counts.molecule, counts.skeleton) == (0, 0)


def test_the_command(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_pairs(tmp_path / "test.tsv", EVALUATION)
    rows, counts = tmp_path / "leaks.jsonl", tmp_path / "leaks.json"
    command = [
        "data",
        "leakage",
        str(corpus),
        "--against",
        source,
        "--rows",
        str(rows),
        "--json",
        str(counts),
    ]
    main([*command, "--workers", "1"])
    assert "same skeleton" in capsys.readouterr().out
    assert [json.loads(line)["row"] for line in rows.read_text().splitlines()] == [2, 3, 4, 7]
    assert json.loads(counts.read_text())["sets"][0]["molecule"] == 2
    with pytest.raises(SystemExit):
        main(["data", "leakage", str(corpus), "--against", "nowhere.tsv"])
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_real_evaluation_sets(shared_data: Path, tmp_path: Path) -> None:
    """PCdes shares molecules with ChEBI-20; its ids do not show it."""
    lines = (shared_data / "chebi20/validation.txt").read_text(encoding="utf-8").splitlines()
    (tmp_path / "part.txt").write_text("\n".join(lines[:1200]), encoding="utf-8")
    build_corpus({"train": [f"{tmp_path}/part.txt"]}, tmp_path / "corpus", replace(ONE, identity="smiles"))
    (counts, *_) = find_leakage(tmp_path / "corpus", [f"{tmp_path}/part.txt"], workers=1)
    assert isinstance(counts, Leakage)
    assert (counts.molecule, counts.text, counts.clean) == (counts.rows, counts.rows, 0)
    (counts, *leaks) = find_leakage(
        tmp_path / "corpus", [str(shared_data / "pcdes/validation.txt")], workers=1
    )
    assert isinstance(counts, Leakage)
    assert 5 < counts.molecule < counts.rows // 10
    assert counts.molecule == sum("molecule" in leak.by for leak in leaks if isinstance(leak, Leak))
