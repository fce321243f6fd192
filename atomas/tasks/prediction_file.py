"""Files of predictions: a header, then one row a line with three columns separated by tabs.

    SMILES        ground truth   output      captions
    description   ground truth   output      molecules

Reading is without quoting, and no row moves another. What is odd about a line is reported with its number:

- no output, or an empty one: a failed prediction, scored as an empty string;
- too many fields (a tab inside a text): put together again, see `_rejoin`; what cannot be told apart is left out;
- an empty line, or one without ground truth: left out, there is nothing to score;
- bytes that are not UTF-8: scored with the replacement character.

Fields are taken as they are: no stripping, no unescaping of doubled backslashes. Only our own marks for what a field
cannot hold are turned back: a tab is written as U+2409, a line feed as U+240A, a carriage return as U+240D.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from atomas.data.molecules import is_molecule
from atomas.errors import AtomasError

INPUT_COLUMNS = {"caption": "SMILES", "molecule": "description"}
REFERENCE_COLUMN, OUTPUT_COLUMN = "ground truth", "output"

_MARKS = {"\t": "\u2409", "\n": "\u240a", "\r": "\u240d"}
_TO_MARKS = str.maketrans(_MARKS)
_FROM_MARKS = str.maketrans({mark: character for character, mark in _MARKS.items()})


class Prediction(NamedTuple):
    """What a model was given, what it should have written, and what it wrote ("" if nothing)."""

    input: str
    reference: str
    output: str


class IrregularLine(NamedTuple):
    """`line` counts from 1; `scored` tells whether its row counts all the same."""

    line: int
    problem: str
    scored: bool


@dataclass(kw_only=True)
class PredictionFile:
    """What was read; `rows[i]` stood in line `lines[i]`."""

    sha256: str
    rows: list[Prediction] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    irregular: list[IrregularLine] = field(default_factory=list)


def read_predictions(path: Path, task: str) -> PredictionFile:
    """The predictions of a file of `task` ("caption" or "molecule").

    Raises:
        AtomasError: the file cannot be read, lacks a column, belongs to the other task, or holds nothing to score.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AtomasError(f"cannot read {path}: {error.strerror}") from error
    read = PredictionFile(sha256=hashlib.sha256(content).hexdigest())
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not lines[-1]:
        lines.pop()  # the end of the last line is no line
    header = [] if not lines else _decode(lines[0])[0].split("\t")
    places = _places(path, header, task)
    for number, line in enumerate(lines[1:], start=2):
        _read_line(read, number, line, header, places, task)
    if not read.rows:
        raise AtomasError(f"{path} holds no row that can be scored ({len(lines[1:])} lines below the header)")
    return read


def write_predictions(path: Path, task: str, rows: Iterable[Sequence[str]]) -> None:
    """Write a file from which `read_predictions` gives back equal rows of (input, ground truth, output).

    Two exceptions: a row without ground truth is not read back, and U+2409, U+240A and U+240D in a text come back
    as what they stand for.
    """
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(prediction_line((INPUT_COLUMNS[task], REFERENCE_COLUMN, OUTPUT_COLUMN)))
        for row in rows:
            file.write(prediction_line(row))


def prediction_line(fields: Sequence[str]) -> str:
    """One line of such a file, with its end."""
    return "\t".join(text.translate(_TO_MARKS) for text in fields) + "\n"


def _places(path: Path, header: Sequence[str], task: str) -> list[int]:
    """Where the three columns stand."""
    names = [name.strip().casefold() for name in header]
    wanted = [INPUT_COLUMNS[task], REFERENCE_COLUMN, OUTPUT_COLUMN]
    missing = [name for name in wanted if name.casefold() not in names]
    if not missing:
        return [names.index(name.casefold()) for name in wanted]
    others = [name for name, column in INPUT_COLUMNS.items() if column.casefold() in names]
    if missing == [INPUT_COLUMNS[task]] and others:
        raise AtomasError(
            f"{path} has a column {INPUT_COLUMNS[others[0]]!r}: its predictions are of --task {others[0]}"
        )
    shown = ", ".join(repr(name[:40]) for name in header) or "none"
    raise AtomasError(
        f"{path} has no column {missing[0]!r}: its first line must be the header "
        f"{' <tab> '.join(wanted)}, and it holds {shown}"
    )


def _read_line(
    read: PredictionFile,
    number: int,
    line: bytes,
    header: Sequence[str],
    places: Sequence[int],
    task: str,
) -> None:
    text, is_utf8 = _decode(line)
    row, problem = _split(text, header, places, task)
    if not is_utf8:
        problem = f"not UTF-8; {problem}" if problem else "not UTF-8: bytes replaced"
    if row is not None:
        read.rows.append(Prediction(*(text.translate(_FROM_MARKS) for text in row)))
        read.lines.append(number)
    if problem:
        read.irregular.append(IrregularLine(number, problem, row is not None))


def _decode(line: bytes) -> tuple[str, bool]:
    """A line without its end, and whether it is UTF-8."""
    line = line.removesuffix(b"\r")
    try:
        return line.decode(), True
    except UnicodeDecodeError:
        return line.decode(errors="replace"), False


def _split(
    text: str, header: Sequence[str], places: Sequence[int], task: str
) -> tuple[Prediction | None, str]:
    """The row of a line, or None; and what is odd about it."""
    if not text:
        return None, "empty line: left out"
    fields = text.split("\t")
    counts = f"{len(fields)} fields for {len(header)} columns"
    if len(fields) <= len(header):
        row = Prediction(*(fields[place] if place < len(fields) else "" for place in places))
        problem = "" if len(fields) == len(header) else f"{counts}: what is missing is empty"
    else:
        known = list(places) == [0, 1, 2] and len(header) == 3
        rejoined = _rejoin(fields, task) if known else None
        if rejoined is None:
            return None, f"{counts}, which cannot be told apart: left out"
        row, problem = rejoined, f"{counts}: a tab inside a text, put together again"
    if not row.reference:
        return None, "no ground truth: left out"
    return row, problem


def _rejoin(fields: Sequence[str], task: str) -> Prediction | None:
    """Three columns out of more fields, by what the columns hold; None where that does not tell.

    Tabs at the end are no text. Molecules: the ground truth is the first SMILES that has a field on both
    sides. Captions: the output begins at the first later field that starts with the ground truth's first word; if
    none does, the tab is in the output, because a ground truth has passed through such a file before.
    """
    if task == "molecule":
        reference = next((place for place in range(1, len(fields) - 1) if is_molecule(fields[place])), None)
        if reference is None:
            return None
        return Prediction(
            "\t".join(fields[:reference]), fields[reference], "\t".join(fields[reference + 1 :]).rstrip("\t")
        )
    word = fields[1].partition(" ")[0]
    output = next((place for place in range(2, len(fields)) if fields[place].startswith(word)), 2)
    return Prediction(fields[0], "\t".join(fields[1:output]), "\t".join(fields[output:]).rstrip("\t"))
