"""Mistakes in options are one line, before anything is loaded or written."""

from pathlib import Path

import pytest

from atomas.cli import main

NOWHERE = "--checkpoint nowhere --data nowhere"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generate --checkpoint nowhere --smiles CCO --batch-size 0", "--batch-size 0: at least 1"),
        ("generate --checkpoint nowhere --smiles CCO --out {folder}", "it is a folder"),
        ("embed --checkpoint nowhere --input x --kind text --out x.npz --batch-size -2", "--batch-size -2"),
        ("embed --checkpoint nowhere --input x --kind text --out {folder}/none/x.npz", "none does not exist"),
        (f"evaluate retrieval {NOWHERE} --batch-size 0", "--batch-size 0"),
        (f"evaluate retrieval {NOWHERE} --rerank 0", "--rerank 0"),
        (f"evaluate grounding {NOWHERE} --max-rows -1", "--max-rows -1"),
        (f"evaluate grounding {NOWHERE} --seed -1", "--seed -1"),
        (f"evaluate captioning {NOWHERE} --report x.json --seed -1", "--seed -1"),
        (f"evaluate generation {NOWHERE} --report x.json --batch-size 0", "--batch-size 0"),
        (f"evaluate captioning {NOWHERE} --report x.json --tokenizer {{folder}}", "holds no tokenizer"),
        ("evaluate predictions nowhere --task caption --report {folder}", "it is a folder"),
        ("evaluate merge nowhere nowhere --out {folder}", "it is a folder"),
        ("visualize --checkpoint nowhere --smiles CC --text x --rows 3 --out x", "--rows are of a corpus"),
    ],
)
def test_one_line(command: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command.format(folder=tmp_path).split())
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("atomas: error: ")
    assert message in line
    assert not list(tmp_path.iterdir())
