"""`atomas generate` and `atomas embed` as a user calls them."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from atomas.cli import main
from atomas.errors import AtomasError
from atomas.tasks.inputs import Inputs, without_long
from atomas.training.model_files import read_model

MOLECULES = ["CCO", "", "c1ccccc1O phenol", "C1CC", "F/C=C/F"]


@pytest.fixture
def molecules(tmp_path: Path) -> Path:
    path = tmp_path / "molecules.smi"
    path.write_text("\r\n".join(MOLECULES) + "\n", encoding="utf-8-sig")
    return path


def _fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_molecule_for_a_text(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        ["generate", "--checkpoint", str(checkpoint), "--text", "An alcohol.", "--max-tokens", "6",
         "--num-return-sequences", "3"]
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "An alcohol."
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3"]


def test_captions_for_a_file(checkpoint: Path, molecules: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = molecules.with_name("captions.jsonl")
    main(
        ["generate", "--checkpoint", str(checkpoint), "--input", str(molecules), "--write", "captions",
         "--max-tokens", "5", "--beams", "1", "--batch-size", "2", "--out", str(out)]
    )  # fmt: skip
    told = capsys.readouterr().err
    assert f"{molecules}:4: left out, 'C1CC' is no molecule: " in told
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["line"], row["input"]) for row in rows] == [(1, "CCO"), (3, "c1ccccc1O"), (5, "F/C=C/F")]
    assert all(row["valid"] is None for row in rows)


def test_molecules_are_judged() -> None:
    from atomas.tasks.generation import _judged

    outputs = _judged(1, "ethanol", ["CCO", "OCC", "C(", "c1ccccc1"], molecules=True)
    assert [output.valid for output in outputs] == [True, True, False, True]
    assert [output.duplicate_of for output in outputs] == [None, 1, None, None]
    assert outputs[2].reason


def test_a_bad_smiles_is_one_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = _fails(["generate", "--checkpoint", str(checkpoint), "--smiles", "C1CC"], capsys)
    assert line.startswith("atomas: error: --smiles 'C1CC' is no molecule: ")


def test_input_needs_to_know_what_to_write(
    checkpoint: Path, molecules: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--write" in _fails(
        ["generate", "--checkpoint", str(checkpoint), "--input", str(molecules)], capsys
    )
    assert "cannot read" in _fails(
        ["generate", "--checkpoint", str(checkpoint), "--input", "nothing.txt", "--write", "captions"], capsys
    )


def test_features_in_both_formats(checkpoint: Path, molecules: Path) -> None:
    blocks = []
    for ending in ("parquet", "npz"):
        out = molecules.with_name(f"features.{ending}")
        main(
            ["embed", "--checkpoint", str(checkpoint), "--input", str(molecules), "--kind", "smiles",
             "--out", str(out), "--batch-size", "2"]
        )  # fmt: skip
    table = pq.read_table(molecules.with_name("features.parquet"))
    arrays = np.load(molecules.with_name("features.npz"))
    assert table["line"].to_pylist() == arrays["line"].tolist() == [1, 3, 5]
    assert table["input"].to_pylist() == arrays["input"].tolist() == ["CCO", "c1ccccc1O", "F/C=C/F"]
    blocks = np.array(table["feature"].to_pylist(), dtype=np.float32)
    assert blocks.shape == (3, 32)
    np.testing.assert_array_equal(blocks, arrays["feature"])
    np.testing.assert_allclose(np.linalg.norm(blocks, axis=1), 1, rtol=1e-5)
    about = json.loads(str(arrays["about"]))
    assert about["kind"] == "smiles"
    assert json.loads(table.schema.metadata[b"atomas"]) == about
    assert not list(molecules.parent.glob("*.partial"))


def test_features_agree_with_a_batch_of_one(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["An alcohol.", "A rather long text about a molecule with a ring", "x"]
    alone = []
    for name, content in (("all", texts), *((str(number), [text]) for number, text in enumerate(texts))):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(content).encode())))
        out = tmp_path / f"{name}.npz"
        main(["embed", "--checkpoint", str(checkpoint), "--input", "-", "--kind", "text", "--out", str(out)])
        alone.append(np.load(out)["feature"])
    np.testing.assert_allclose(alone[0], np.concatenate(alone[1:]), atol=1e-5)


def test_an_unknown_ending(checkpoint: Path, molecules: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = _fails(
        [
            "embed",
            "--checkpoint",
            str(checkpoint),
            "--input",
            str(molecules),
            "--kind",
            "smiles",
            "--out",
            "x.csv",
        ],
        capsys,
    )
    assert ".parquet or .npz" in line


def test_long_texts_are_cut_as_in_training(checkpoint: Path, tmp_path: Path) -> None:
    _, tokenizer, config = read_model(checkpoint)
    text = "The molecule is an alcohol. " * 200
    _, offsets = tokenizer.encode_with_offsets(text)
    assert len(offsets) > config.data.max_text_tokens
    read = text[: offsets[config.data.max_text_tokens - 2][1]]
    (tmp_path / "texts.txt").write_text(f"{text}\n{read}\n{read[:-40]}\n")
    out = tmp_path / "texts.npz"
    main(["embed", "--checkpoint", str(checkpoint), "--input", str(tmp_path / "texts.txt"), "--kind", "text",
          "--out", str(out)])  # fmt: skip
    long, cut, other = np.load(out)["feature"]
    np.testing.assert_allclose(long, cut, atol=1e-6)
    assert not np.allclose(long, other, atol=1e-6)


def test_what_a_model_cannot_read_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    inputs = Inputs(kind="smiles", values=["CCO", "CCCCCCCC", "C"], numbers=[1, 2, 4])
    assert without_long(inputs, [4, 9, 2], None) is inputs
    assert without_long(inputs, [4, 9, 2], 4).numbers == [1, 4]
    assert capsys.readouterr().err == "line 2: left out, it has 9 tokens and the model reads 4\n"
    with pytest.raises(AtomasError, match="no input has at most 1 tokens"):
        without_long(inputs, [4, 9, 2], 1)
