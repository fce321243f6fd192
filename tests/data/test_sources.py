"""Pair files in every format: the same rows, and clear words about what is wrong with a file."""

import csv
import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atomas.data.row_formats import Row
from atomas.data.sources import Columns, PairFile
from atomas.errors import AtomasError

HEADER = ["CID", "SMILES", "description"]
PAIRS = [
    ["1", "CCO", 'an alcohol, also called "ethanol'],
    ["2", r"C/C=C\C", "a butene \u2028 with a \u00b0 sign"],
    ["3", "C#N", ""],
]


def write_tsv(path: Path) -> None:
    lines = ["\t".join(row) for row in [HEADER, *PAIRS]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_tsv_of_windows(path: Path) -> None:
    lines = ["\t".join(row) for row in [HEADER, *PAIRS]]
    path.write_bytes("\r\n".join(["", *lines]).encode("utf-8-sig"))


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER, *PAIRS])


def write_jsonl(path: Path) -> None:
    rows = [dict(zip(HEADER, [int(row[0]), *row[1:]], strict=True)) for row in PAIRS]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path: Path) -> None:
    table = {name: [row[i] or None for row in PAIRS] for i, name in enumerate(HEADER)}
    pq.write_table(pa.table(table | {"CID": [1, 2, 3]}), path)


def write_gzip(path: Path) -> None:
    write_csv(path)
    path.write_bytes(gzip.compress(path.read_bytes()))


def read(source: Path | str, columns: Columns | None = None, *, need_text: bool = True) -> list[Row]:
    return list(PairFile.parse(str(source)).rows(columns or Columns(), need_text=need_text))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("pairs.tsv", write_tsv),
        ("pairs.txt", write_tsv_of_windows),
        ("pairs.csv", write_csv),
        ("pairs.jsonl", write_jsonl),
        ("pairs.parquet", write_parquet),
        ("pairs.csv.gz", write_gzip),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    rows = read(tmp_path / name)
    assert [[row.id, row.smiles, row.text] for row in rows] == PAIRS
    assert not any(row.problem for row in rows)
    assert len(rows) == 3


def test_zip_member(tmp_path: Path) -> None:
    write_tsv(tmp_path / "pairs.txt")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "pairs.txt", "in/pairs.txt")
        archive.writestr("readme.md", "no pairs")
    assert len(read(tmp_path / "a.zip")) == 3
    assert len(read(f"{tmp_path}/a.zip:in/pairs.txt")) == 3
    with pytest.raises(AtomasError, match=r"no pair file 'other.txt'.* it has in/pairs.txt"):
        read(f"{tmp_path}/a.zip:other.txt")


def test_columns_by_any_case_order_and_option(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("Caption\tnote\t IsoSMILES \nwater\tx\tO\n")
    assert read(path)[0][:4] == (2, "O", "water", "")
    row = read(path, Columns(smiles="isosmiles", text="NOTE", id="Caption"))[0]
    assert (row.smiles, row.text, row.id) == ("O", "x", "water")


def test_both_smiles_and_isosmiles_takes_the_first_usual_name(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("isosmiles\tsmiles\ttext\nN\tO\twater\n")
    assert read(path)[0].smiles == "O"


def test_missing_column_lists_those_there_are(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("name,smiles\nwater,O\n")
    with pytest.raises(AtomasError, match=r"no text column .*columns are 'name', 'smiles': .*--text-column"):
        read(path)
    with pytest.raises(AtomasError, match=r"no column 'label'"):
        read(path, Columns(text="label"))
    assert read(path, need_text=False)[0].smiles == "O"


def test_file_without_a_header(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("O\twater\nN\tammonia\n")
    with pytest.raises(AtomasError, match=r"columns are 'O', 'water'.*--columns if the file has no header"):
        read(path)
    rows = read(path, Columns(header=("smiles", "text")))
    assert [(row.line, row.smiles, row.text) for row in rows] == [(1, "O", "water"), (2, "N", "ammonia")]


def test_bad_rows_keep_their_line_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_bytes(b"smiles\ttext\nO\twater\n\nO\n O\twa\tter\nO\tcaf\xe9\n")
    rows = read(path)
    assert [row.line for row in rows] == [2, 4, 5, 6]
    assert [row.problem.split(" (")[0] for row in rows] == [
        "",
        "1 fields where the header names 2",
        "3 fields where the header names 2",
        "column 'text' is not UTF-8",
    ]
    assert rows[3].excerpt == "O\tcaf\\udce9"


def test_csv_line_numbers_count_lines_inside_quotes(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text('smiles,text\r\nO,"one\r\ntwo"\r\nN,"a ""b"", c"\r\n', newline="")
    assert [(row.line, row.text) for row in read(path)] == [(2, "one\r\ntwo"), (4, 'a "b", c')]


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_the_parts_of_a_csv_hold_every_row_once_whatever_ends_a_line(tmp_path: Path, end: str) -> None:
    path = tmp_path / "pairs.csv"
    rows = [f'C,"text {number}{end}goes on"' for number in range(200)]
    path.write_bytes(end.join(["smiles,text", *rows, ""]).encode())
    pair_file, whole = PairFile.parse(str(path)), read(path)
    layout = pair_file.layout(Columns(), part_bytes=300)
    assert len(layout.parts) > 5
    assert [row for part in layout.parts for row in pair_file.read(layout.names, part, Columns())] == whole
    assert [row.text for row in whole] == [f"text {number}{end}goes on" for number in range(200)]


def test_bad_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '[1]\n{"smiles": "O", "text": "water"}\n{"smiles": \n{"smiles": "O", "text": ["a"]}\n{}\n'
    )
    rows = read(path)
    assert [row.problem.split(":")[0] for row in rows] == [
        "not a JSON object",
        "",
        "not JSON",
        "column 'text' holds no string",
        "",
    ]
    assert rows[4].smiles == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pairs.xlsx", b"PK", "cannot tell the format"),
        ("pairs.parquet", b"not parquet", "not a Parquet file"),
        ("pairs.tsv.gz", b"not gzip", "cannot read .*gzip"),
        ("pairs.zip", b"not zip", "cannot read .*zip"),
        ("pairs.tsv.gz", gzip.compress(b"smiles\ttext\n" + b"O\twater\n" * 9, mtime=0)[:-9], "cannot read"),
    ],
)
def test_unreadable_files_are_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AtomasError, match=message) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(AtomasError, match="there is no file"):
        PairFile.parse(str(tmp_path / "none.tsv"))
    with pytest.raises(AtomasError, match="is a folder"):
        PairFile.parse(str(tmp_path))


def test_real_files_have_the_documented_rows(shared_data: Path) -> None:
    expected = {
        "chebi20/validation.txt": 3301,
        "pubchem324k/validation.txt": 1000,
        "iupac/validation.txt": 982,
        "pcdes/validation.txt": 1500,
        "pcdes/misaligned.txt": 5562,
    }
    for name, count in expected.items():
        rows = read(shared_data / name)
        assert len(rows) == count, name
        assert not any(row.problem for row in rows), name


def test_moleculenet_csvs_give_smiles(shared_data: Path) -> None:
    counts = {
        path.name: len(read(path, need_text=False)) for path in (shared_data / "moleculenet").glob("*.csv")
    }
    assert counts["FreeSolv_SAMPL.csv"] == 642
    assert counts["tox21.csv"] == 7831
    assert len(counts) == 8
    named = read(shared_data / "moleculenet/FreeSolv_SAMPL.csv", Columns(text="iupac"))
    assert named[0].text == "4-methoxy-N,N-dimethyl-benzamide"


def test_headerless_zip_member_of_real_data(shared_data: Path) -> None:
    source = f"{shared_data}/lpm24/additional_data.zip:train_props.txt"
    first = next(PairFile.parse(source).rows(Columns(header=("smiles", "text"))))
    assert first.text.startswith("{'Diabetic heart disease'")
    with pytest.raises(
        AtomasError, match=r"name one as .*additional_data.zip:MEMBER; it has train_props.txt"
    ):
        PairFile.parse(f"{shared_data}/lpm24/additional_data.zip")
