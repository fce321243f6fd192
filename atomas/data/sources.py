"""Pair files as they come: TSV, CSV, JSON Lines and Parquet, plain, gzipped or inside a zip archive.

TSV is read without quoting (captions hold single `"`), CSV with quoting and any line ends. A file is cut into parts
at ends of rows, so that many processes may read it; a part of a compressed file is reached by decompressing what lies
before it.
"""

import codecs
import csv
import gzip
import io
import json
import math
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from atomas.errors import AtomasError

SMILES_COLUMNS = ("smiles", "isosmiles", "isomeric_smiles", "canonical_smiles")
TEXT_COLUMNS = ("description", "text", "caption", "summary")
ID_COLUMNS = ("cid", "id")
KINDS = {
    ".tsv": "tsv",
    ".tab": "tsv",
    ".txt": "tsv",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
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
class Columns:
    """Which columns hold what; None: found by the usual names. `header` names those of a file without one."""

    smiles: str | None = None
    text: str | None = None
    id: str | None = None
    header: tuple[str, ...] | None = None


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


@dataclass(frozen=True, kw_only=True)
class PairFile:
    """A file of molecule-text pairs; `member` is the file inside a zip archive."""

    path: Path
    member: str | None
    kind: str
    gzipped: bool

    @staticmethod
    def parse(source: str) -> "PairFile":
        """From `FILE` or `ARCHIVE.zip:MEMBER`.

        Raises AtomasError if it is not there, of unknown kind, or an archive of several files.
        """
        path, member = _split_member(source)
        if not path.exists():
            raise AtomasError(f"there is no file {path}")
        if path.is_dir():
            raise AtomasError(f"{path} is a folder, a pair file is wanted (TSV, CSV, JSONL or Parquet)")
        if path.suffix.lower() == ".zip":
            member = _zip_member(path, member)
        name = Path(member or path.name)
        gzipped = member is None and name.suffix.lower() == ".gz"
        kind = KINDS.get(Path(name.stem if gzipped else name).suffix.lower())
        if kind is None:
            raise AtomasError(
                f"{source}: cannot tell the format from the name; known endings are {', '.join(KINDS)} "
                "(also with .gz, or as ARCHIVE.zip:MEMBER)"
            )
        return PairFile(path=path, member=member, kind=kind, gzipped=gzipped)

    @property
    def name(self) -> str:
        """The file as a user knows it, with its folder."""
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    def rows(self, columns: Columns, *, need_text: bool = True) -> Iterator[Row]:
        """The rows in order; blank lines are skipped.

        Raises AtomasError if a column is missing (naming those there are) or the file cannot be read.
        """
        layout = self.layout(columns, part_bytes=None, need_text=need_text)
        for part in layout.parts:
            yield from self.read(layout.names, part, columns, need_text=need_text)

    def layout(self, columns: Columns, *, part_bytes: int | None, need_text: bool = True) -> Layout:
        """Cut into parts of about `part_bytes` (None: one part) that end where a row does.

        Raises AtomasError as `rows` does.
        """
        size = part_bytes or sys.maxsize
        with self._open() as file:
            if self.kind == "parquet":
                layout = _parquet_layout(file, size)
            elif self.kind == "jsonl":
                layout = _layout(_jsonl_ends(file), _jsonl_names, None, size)
            else:
                records = _csv_records(file) if self.kind == "csv" else _tsv_records(file)
                layout = _layout(records, lambda fields: fields, columns.header, size)
        if layout.names:
            _choose_columns(self.name, layout.names, columns, need_text=need_text)
        return layout

    def read(
        self, names: Sequence[str], part: Part, columns: Columns, *, need_text: bool = True
    ) -> Iterator[Row]:
        """The rows of one part; `names` are those of the file's layout."""
        # A file of JSON lines without one object has no names, and no row that is usable.
        chosen = _Chosen("", None, None)
        if names:
            chosen = _choose_columns(self.name, names, columns, need_text=need_text)
        with self._open() as file:
            if self.kind == "parquet":
                yield from _parquet_rows(file, part, chosen)
                return
            file.seek(part.start)
            if self.kind == "jsonl":
                yield from _jsonl_rows(file, part, chosen)
            else:
                records = _csv_records(file, part) if self.kind == "csv" else _tsv_records(file, part)
                yield from _table_rows(records, names, chosen)

    def num_bytes(self) -> int:
        """About how many bytes it holds decompressed."""
        if self.member is not None:
            with zipfile.ZipFile(self.path) as archive:
                return archive.getinfo(self.member).file_size
        size = self.path.stat().st_size
        return size * 4 if self.gzipped or self.kind == "parquet" else size

    @contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        try:
            if self.member is not None:
                with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as member:
                    yield member
            else:
                with self.path.open("rb") as file:
                    yield cast(IO[bytes], gzip.GzipFile(fileobj=file)) if self.gzipped else file
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile, csv.Error) as error:
            raise AtomasError(
                f"cannot read {self.name}: {getattr(error, 'strerror', None) or error}"
            ) from error


class _Chosen(NamedTuple):
    smiles: str
    text: str | None
    id: str | None


def _split_member(source: str) -> tuple[Path, str | None]:
    archive, separator, member = source.partition(".zip:")
    return (Path(archive + ".zip"), member) if separator else (Path(source), None)


def _zip_member(path: Path, member: str | None) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if Path(name).suffix.lower() in KINDS]
    except (OSError, zipfile.BadZipFile) as error:
        raise AtomasError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if member in names:
        return str(member)
    if member is None and len(names) == 1:
        return names[0]
    what = f"has no pair file {member!r}" if member else "holds not one pair file"
    raise AtomasError(f"{path} {what}: name one as {path}:MEMBER; it has {', '.join(names) or 'none'}")


def _choose_columns(file: str, names: Sequence[str], columns: Columns, *, need_text: bool) -> _Chosen:
    smiles = _find(file, names, columns.smiles, SMILES_COLUMNS, "SMILES", "--smiles-column")
    text = None
    if need_text:
        text = _find(file, names, columns.text, TEXT_COLUMNS, "text", "--text-column")
    id_column = None
    if columns.id is not None or _match(names, ID_COLUMNS):
        id_column = _find(file, names, columns.id, ID_COLUMNS, "id", "--id-column")
    return _Chosen(smiles, text, id_column)


def _find(
    file: str, names: Sequence[str], wanted: str | None, usual: Sequence[str], what: str, option: str
) -> str:
    found = _match(names, (wanted.casefold(),) if wanted is not None else usual)
    if wanted in names:
        return str(wanted)
    if found is None:
        missing = f"no column {wanted!r}" if wanted is not None else f"no {what} column ({', '.join(usual)})"
        shown = ", ".join(repr(name[:40]) for name in names[:30])
        raise AtomasError(
            f"{file} has {missing}; its columns are {shown}: name one with {option}, "
            "or all with --columns if the file has no header line"
        )
    return found


def _match(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    folded = {name.strip().casefold(): name for name in reversed(names)}
    return next((folded[name] for name in wanted if name in folded), None)


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


def _tsv_records(file: IO[bytes], part: Part | None = None) -> Iterator[Record]:
    for number, line, end in _lines(file, part):
        if line.strip():
            yield number, line.rstrip("\r\n").split("\t"), end


def _csv_records(file: IO[bytes], part: Part | None = None) -> Iterator[Record]:
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


def _jsonl_ends(file: IO[bytes]) -> Iterator[Record]:
    """As records of one field, the whole line."""
    for number, line, end in _lines(file, None):
        if line.strip():
            yield number, [line], end


def _jsonl_names(fields: Sequence[str]) -> Sequence[str]:
    """Keys of an object; none of anything else."""
    with suppress(ValueError):
        values = json.loads(fields[0])
        if isinstance(values, dict):
            return list(values)
    return ()


def _layout(
    records: Iterator[Record],
    read_names: Callable[[Sequence[str]], Sequence[str]],
    header: Sequence[str] | None,
    part_bytes: int,
) -> Layout:
    """Parts of the records; the column names are `header` or, with `read_names`, those of the first that has any."""
    names = tuple(header or ())
    is_table = read_names is not _jsonl_names
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


def _table_rows(records: Iterator[Record], names: Sequence[str], chosen: "_Chosen") -> Iterator[Row]:
    for line, fields, _ in records:
        values = dict(zip(names, fields, strict=False))
        problem = ""
        if len(fields) != len(names):
            problem = f"{len(fields)} fields where the header names {len(names)}"
        yield _row(line, values, chosen, problem, "\t".join(fields))


def _jsonl_rows(file: IO[bytes], part: Part, chosen: "_Chosen") -> Iterator[Row]:
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


def _parquet_layout(file: IO[bytes], part_bytes: int) -> Layout:
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


def _parquet_rows(file: IO[bytes], part: Part, chosen: "_Chosen") -> Iterator[Row]:
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


def _row(line: int, values: Mapping[str, Any], chosen: _Chosen, problem: str, raw: str) -> Row:
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
