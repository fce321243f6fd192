"""Rows of TSV, CSV, JSON Lines and Parquet files, and the parts that these can be cut into.

TSV is read without quoting (captions hold single `"`), CSV with quoting and any line ends.
"""

import codecs
import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import IO, Any, NamedTuple

EXCERPT_LENGTH = 200

csv.field_size_limit(2**31 - 1)


class Row(NamedTuple):
    """One row as read. `line` counts lines (Parquet: rows) from 1; `problem` says why it is unusable."""

    line: int
    smiles: str
    text: str
    id: str
    problem: str
    excerpt: str


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive rows of a file: bytes [start, stop) of what it holds decompressed (Parquet: rows).

    `line` is the number of the first line; `rows` at most how many there are.
    """

    start: int
    stop: int
    line: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The names of a file's columns and the parts it is cut into."""

    names: tuple[str, ...]
    parts: tuple[Part, ...]


class ChosenColumns(NamedTuple):
    """Names of the columns that are read."""

    smiles: str
    text: str | None
    id: str | None


Record = tuple[int, list[str], int]
"""Number of a row's first line, its fields, and the byte at which the next row begins."""


def _lines(file: IO[bytes], part: Part | None) -> Iterator[tuple[int, str, int]]:
    """Lines (ended by LF) of a file or of a part, with their number and the byte after them."""
    end = part.start if part else 0
    for number, line in enumerate(file, start=part.line if part else 1):
        start, end = end, end + len(line)
        if not start and line.startswith(codecs.BOM_UTF8):
            line = line[len(codecs.BOM_UTF8) :]
        yield number, line.decode(errors="surrogateescape"), end
        if part and end >= part.stop:
            return


def tsv_records(file: IO[bytes], part: Part | None = None) -> Iterator[Record]:
    """Lines cut at tabs, without quoting."""
    for number, line, end in _lines(file, part):
        if line.strip():
            yield number, line.rstrip("\r\n").split("\t"), end


def csv_records(file: IO[bytes], part: Part | None = None) -> Iterator[Record]:
    """Rows of a CSV file, which may go over several lines."""
    consumed = 0

    def lines() -> Iterator[str]:
        nonlocal consumed
        for _, line, end in _lines(file, part):
            consumed = end - len(line.encode(errors="surrogateescape"))
            for piece in _CSV_LINE.findall(line):
                consumed += len(piece.encode(errors="surrogateescape"))
                yield piece

    reader = csv.reader(lines())
    before = part.line - 1 if part else 0
    first_line = before + 1
    for fields in reader:
        if fields:
            yield first_line, fields, consumed
        if part and consumed >= part.stop:  # what follows up to the next LF belongs to the next part
            return
        first_line = before + reader.line_num + 1


_CSV_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
"""A line with its end, be it CR, LF or both."""


def jsonl_ends(file: IO[bytes]) -> Iterator[Record]:
    """As records of one field, the whole line."""
    for number, line, end in _lines(file, None):
        if line.strip():
            yield number, [line], end


def jsonl_names(fields: Sequence[str]) -> Sequence[str]:
    """Keys of an object; none of anything else."""
    with suppress(ValueError):
        values = json.loads(fields[0])
        if isinstance(values, dict):
            return list(values)
    return ()


def table_layout(
    records: Iterator[Record],
    read_names: Callable[[Sequence[str]], Sequence[str]],
    header: Sequence[str] | None,
    part_bytes: int,
) -> Layout:
    """Parts of the records; the column names are `header` or, with `read_names`, those of the first that has any."""
    names = tuple(header or ())
    is_table = read_names is not jsonl_names
    parts: list[Part] = []
    start = line = rows = end = 0
    for number, fields, end in records:
        if not names:
            names = tuple(read_names(fields))
            if is_table:
                start = end
                continue
        line = line or number
        rows += 1
        if end - start >= part_bytes:
            parts.append(Part(start=start, stop=end, line=line, rows=rows))
            start, line, rows = end, 0, 0
    if rows:
        parts.append(Part(start=start, stop=end, line=line, rows=rows))
    return Layout(names=names, parts=tuple(parts))


def table_rows(records: Iterator[Record], names: Sequence[str], chosen: ChosenColumns) -> Iterator[Row]:
    """Rows of a TSV or CSV file."""
    for line, fields, _ in records:
        values = dict(zip(names, fields, strict=False))
        problem = ""
        if len(fields) != len(names):
            problem = f"{len(fields)} fields where the header names {len(names)}"
        yield _row(line, values, chosen, problem, "\t".join(fields))


def jsonl_rows(file: IO[bytes], part: Part, chosen: ChosenColumns) -> Iterator[Row]:
    """Rows of JSON lines."""
    for number, line, _ in _lines(file, part):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            problem = "" if isinstance(values, dict) else "not a JSON object"
        except ValueError as error:
            values, problem = None, f"not JSON: {error}"
        if problem:
            yield Row(number, "", "", "", problem, _excerpt(line))
            continue
        yield _row(number, values, chosen, "", line)


def parquet_layout(file: IO[bytes], part_bytes: int) -> Layout:
    """Parts of whole rows, as the file says how many there are."""
    parquet = _parquet(file)
    total = int(parquet.metadata.num_rows)
    groups = [parquet.metadata.row_group(number) for number in range(parquet.metadata.num_row_groups)]
    row_bytes = max(1, sum(group.total_byte_size for group in groups) // max(1, total))
    step = max(1, part_bytes // row_bytes)
    parts = [
        Part(start=start, stop=min(start + step, total), line=start + 1, rows=min(step, total - start))
        for start in range(0, total, step)
    ]
    return Layout(names=tuple(parquet.schema_arrow.names), parts=tuple(parts))


def parquet_rows(file: IO[bytes], part: Part, chosen: ChosenColumns) -> Iterator[Row]:
    """Rows of a part; OSError where the file is damaged."""
    import pyarrow

    parquet = _parquet(file)
    wanted = list(dict.fromkeys(name for name in chosen if name is not None))
    ends = list(
        accumulate(parquet.metadata.row_group(g).num_rows for g in range(parquet.metadata.num_row_groups))
    )
    groups = [
        group
        for group, (first, end) in enumerate(zip([0, *ends], ends, strict=False))
        if first < part.stop and end > part.start
    ]
    number = ends[groups[0] - 1] if groups and groups[0] else 0
    try:
        for batch in parquet.iter_batches(batch_size=4096, row_groups=groups, columns=wanted):
            first = max(0, part.start - number)
            last = min(batch.num_rows, part.stop - number)
            for offset, values in enumerate(batch.slice(first, max(0, last - first)).to_pylist()):
                line = number + first + offset + 1
                yield _row(line, values, chosen, "", "\t".join(str(value) for value in values.values()))
            number += batch.num_rows
    except pyarrow.ArrowException as error:
        raise OSError(f"damaged after row {number}: {error}") from error


def _parquet(file: IO[bytes]) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(file if file.seekable() else io.BytesIO(file.read()))
    except pyarrow.ArrowException as error:
        raise OSError(f"not a Parquet file: {error}") from error


def _row(line: int, values: Mapping[str, Any], chosen: ChosenColumns, problem: str, raw: str) -> Row:
    def string(name: str | None) -> str:
        nonlocal problem
        value = _as_string(values.get(name)) if name is not None else ""
        if value is None:
            problem = problem or f"column {name!r} holds no string"
        elif not _is_utf8(value):
            problem = problem or f"column {name!r} is not UTF-8 (convert the file, for instance with iconv)"
        return value or ""

    smiles, text, id_ = string(chosen.smiles), string(chosen.text), string(chosen.id)
    return Row(line, smiles, text, id_, problem, _excerpt(raw))


def _as_string(value: object) -> str | None:
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value) if isinstance(value, int | float) else None


def _is_utf8(value: str) -> bool:
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _excerpt(raw: str) -> str:
    text = raw[:EXCERPT_LENGTH].rstrip("\r\n")
    if text.isascii():
        return text
    return text.encode(errors="backslashreplace").decode()
