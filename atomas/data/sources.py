"""Pair files as they come: TSV, CSV, JSON Lines and Parquet, plain, gzipped or inside a zip archive.

TSV is read without quoting (captions hold single `"`), CSV with quoting and any line ends.
"""

import csv
import gzip
import io
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

        def choose(names: Sequence[str]) -> _Chosen:
            return _choose_columns(self.name, names, columns, need_text=need_text)

        with self._open() as file:
            if self.kind == "parquet":
                yield from _parquet_rows(file, choose)
            elif self.kind == "jsonl":
                yield from _jsonl_rows(_as_text(file, newline="\n"), choose)
            else:
                records = _csv_records(file) if self.kind == "csv" else _tsv_records(file)
                yield from _table_rows(records, columns.header, choose)

    def count_rows(self) -> int:
        """About how many rows there are (line ends, for a progress bar)."""
        with self._open() as file:
            if self.kind == "parquet":
                return int(_parquet(file).metadata.num_rows)
            return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(2**20), b""))

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


def _as_text(file: IO[bytes], *, newline: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _tsv_records(file: IO[bytes]) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(_as_text(file, newline="\n"), start=1):
        if line.strip():
            yield number, line.rstrip("\r\n").split("\t")


def _csv_records(file: IO[bytes]) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(_as_text(file, newline=""))
    first_line = 1
    for fields in reader:
        if fields:
            yield first_line, fields
        first_line = reader.line_num + 1


def _table_rows(
    records: Iterator[tuple[int, list[str]]],
    header: Sequence[str] | None,
    choose: Callable[[Sequence[str]], _Chosen],
) -> Iterator[Row]:
    if header is None:
        _, header = next(records, (0, []))
        if not header:
            return
    chosen = choose(header)
    for line, fields in records:
        values = dict(zip(header, fields, strict=False))
        problem = ""
        if len(fields) != len(header):
            problem = f"{len(fields)} fields where the header names {len(header)}"
        yield _row(line, values, chosen, problem, "\t".join(fields))


def _jsonl_rows(lines: io.TextIOWrapper, choose: Callable[[Sequence[str]], _Chosen]) -> Iterator[Row]:
    chosen = None
    for number, line in enumerate(lines, start=1):
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
        chosen = chosen or choose(list(values))
        yield _row(number, values, chosen, "", line)


def _parquet_rows(file: IO[bytes], choose: Callable[[Sequence[str]], _Chosen]) -> Iterator[Row]:
    import pyarrow

    parquet = _parquet(file)
    chosen = choose(parquet.schema_arrow.names)
    wanted = list(dict.fromkeys(name for name in chosen if name is not None))
    number = 0
    try:
        for batch in parquet.iter_batches(batch_size=4096, columns=wanted):
            for values in batch.to_pylist():
                number += 1
                yield _row(number, values, chosen, "", "\t".join(str(value) for value in values.values()))
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
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _excerpt(raw: str) -> str:
    text = raw.rstrip("\r\n")[:EXCERPT_LENGTH]
    return text.encode(errors="backslashreplace").decode()
