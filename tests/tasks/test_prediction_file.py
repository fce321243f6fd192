"""Files of predictions: the published ones, the hazards that must not move a row, and the round trip."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atomas.errors import AtomasError
from atomas.tasks.prediction_file import Prediction, read_predictions, write_predictions

CAPTIONS = b"SMILES\tground truth\toutput\n"
MOLECULES = b"description\tground truth\toutput\n"
ALCOHOL = Prediction("CCO", "The molecule is an alcohol.", "The molecule is an ether.")
BEFORE = b"CCO\tThe molecule is an alcohol.\tThe molecule is an ether.\n"
AFTER = b"CCN\tThe molecule is an amine.\tIt is an amine.\n"


def read(folder: Path, content: bytes, task: str = "caption") -> tuple[list[Prediction], list[tuple]]:
    """Rows, and (line, scored) of what is irregular."""
    file = folder / "predictions.txt"
    file.write_bytes(content)
    found = read_predictions(file, task)
    return found.rows, [(line.line, line.scored) for line in found.irregular]


@pytest.mark.parametrize("kind", ["caption", "molecule"])
def test_published_files_are_regular(shared_data: Path, kind: str) -> None:
    name = {"caption": "smiles2caption", "molecule": "caption2smiles"}[kind]
    found = read_predictions(shared_data / "predictions" / f"molt5-small-{name}.txt", kind)
    assert len(found.rows) == 3300
    assert found.irregular == []
    assert found.lines == list(range(2, 3302))


@pytest.mark.parametrize(
    ("line", "row", "irregular"),
    [
        (b"CC\tThe acid.\t", Prediction("CC", "The acid.", ""), []),  # an empty output
        (b"CC\tThe acid.", Prediction("CC", "The acid.", ""), [(3, True)]),  # none
        (b'CC\tThe "acid.\tAn "ester', Prediction("CC", 'The "acid.', 'An "ester'), []),  # odd quotes
        (b'"CC\tThe acid.\tx', Prediction('"CC', "The acid.", "x"), []),
        (b"CC\tThe acid.\tThe\tester.", Prediction("CC", "The acid.", "The\tester."), [(3, True)]),
        (b"CC\tThe\tacid.\tThe ester.", Prediction("CC", "The\tacid.", "The ester."), [(3, True)]),
        (b"CC\tThe acid.\tNo\tester.", Prediction("CC", "The acid.", "No\tester."), [(3, True)]),
        (b"CC\tThe acid.\tThe ester.\t\t", Prediction("CC", "The acid.", "The ester."), [(3, True)]),
        (b"", None, [(3, False)]),
        (b"\r", None, [(3, False)]),
        (b"   ", None, [(3, False)]),
        (b"\t\t", None, [(3, False)]),
        (b"CC\t\tThe ester.", None, [(3, False)]),
        (b"and on goes the text above", None, [(3, False)]),
        (b"CC\tThe acid \xff.\tx", Prediction("CC", "The acid \ufffd.", "x"), [(3, True)]),
        (b" CC\t The acid \t x ", Prediction(" CC", " The acid ", " x "), []),  # as it is
        (rb"C/C=C\\C" + b"\tThe acid.\tx", Prediction(r"C/C=C\\C", "The acid.", "x"), []),
        ("CC\tThe\u2028acid\x0b\x85.\tx".encode(), Prediction("CC", "The\u2028acid\x0b\x85.", "x"), []),
    ],
)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_line_moves_no_other(
    tmp_path: Path, line: bytes, row: Prediction | None, irregular: list[tuple], end: bytes
) -> None:
    content = b"\xef\xbb\xbf" + (CAPTIONS + BEFORE + line + b"\n" + AFTER).replace(b"\n", end)
    rows, problems = read(tmp_path, content)
    assert rows[0] == ALCOHOL
    assert rows[-1].output == "It is an amine."
    assert rows[1:-1] == ([] if row is None else [row])
    assert problems == irregular


@pytest.mark.parametrize(
    ("line", "row"),
    [
        (b"The\tacid.\tCCO\tCCN", Prediction("The\tacid.", "CCO", "CCN")),
        (b"The acid.\tCCO\tCC\tN", Prediction("The acid.", "CCO", "CC\tN")),
        (b"The\tacid.\tCCO\t", Prediction("The\tacid.", "CCO", "")),
        (b"The acid.\tCCO\tCCN\t", Prediction("The acid.", "CCO", "CCN")),
        (b"The\tacid.\tCCO\tCCN\t\t", Prediction("The\tacid.", "CCO", "CCN")),
        (b"The\tacid.\tnot one\tnor this", None),
    ],
)
def test_a_tab_among_molecules(tmp_path: Path, line: bytes, row: Prediction | None) -> None:
    rows, problems = read(tmp_path, MOLECULES + line + b"\nAn amine.\tCN\tCCN\n", "molecule")
    assert rows[-1] == Prediction("An amine.", "CN", "CCN")
    assert rows[:-1] == ([] if row is None else [row])
    assert problems == [(2, row is not None)]


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    content = b"id\tOutput\tsmiles\tGround truth\r\n7\tan ether\tCCO\tan alcohol\r\n8\tan amine\tCCN\r\n"
    rows, problems = read(tmp_path, content)
    assert rows == [Prediction("CCO", "an alcohol", "an ether")]
    assert problems == [(3, False)]


def test_a_last_line_without_an_end(tmp_path: Path) -> None:
    assert len(read(tmp_path, CAPTIONS + BEFORE + AFTER.rstrip(b"\n"))[0]) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no column 'SMILES'"),
        (BEFORE + AFTER, "no column 'SMILES'.*it holds 'CCO'"),
        (b"SMILES\tground truth\n" + BEFORE, "no column 'output'"),
        (b"SMILES\toutput\n" + BEFORE, "no column 'ground truth'"),
        (MOLECULES + BEFORE, "--task molecule"),
        (CAPTIONS, "no row that can be scored"),
        (CAPTIONS + b"\n\nCCO\n", "no row that can be scored"),
        ((CAPTIONS + BEFORE).decode().encode("utf-16"), "no column"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(AtomasError, match=message) as raised:
        read(tmp_path, content)
    assert "\n" not in str(raised.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.txt"):
        with pytest.raises(AtomasError, match="cannot read"):
            read_predictions(path, "caption")


TEXTS = st.text(
    st.characters(exclude_characters="\u2409\u240a\u240d", exclude_categories=["Cs"]), max_size=12
)
ROWS = st.lists(st.tuples(TEXTS, TEXTS.filter(bool), TEXTS), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS, st.sampled_from(["caption", "molecule"]))
def test_what_is_written_is_read_back(tmp_path: Path, rows: list[tuple[str, str, str]], task: str) -> None:
    file = tmp_path / "written.tsv"
    write_predictions(file, task, rows)
    found = read_predictions(file, task)
    assert found.rows == rows
    assert found.irregular == []


def test_what_is_written_is_the_published_format(tmp_path: Path, shared_data: Path) -> None:
    published = shared_data / "predictions" / "caption2smiles_example.txt"
    copy = tmp_path / "copy.txt"
    write_predictions(copy, "molecule", read_predictions(published, "molecule").rows)
    assert copy.read_bytes().rstrip(b"\n") == published.read_bytes().rstrip(b"\n")
