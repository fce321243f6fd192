"""Pair files as they come: TSV, CSV, JSON Lines and Parquet, plain, gzipped or inside a zip archive.

A file is cut into parts at ends of rows, so that many processes may read it; a part of a compressed file is reached by
decompressing what lies before it.
"""

import csv
import gzip
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from atomas.data.row_formats import (
    ChosenColumns,
    Layout,
    Part,
    Row,
    csv_records,
    jsonl_ends,
    jsonl_names,
    jsonl_rows,
    parquet_layout,
    parquet_rows,
    table_layout,
    table_rows,
    tsv_records,
)
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
                layout = parquet_layout(file, size)
            elif self.kind == "jsonl":
                layout = table_layout(jsonl_ends(file), jsonl_names, None, size)
            else:
                records = csv_records(file) if self.kind == "csv" else tsv_records(file)
                layout = table_layout(records, lambda fields: fields, columns.header, size)
        if layout.names:
            _choose_columns(self.name, layout.names, columns, need_text=need_text)
        return layout

    def read(
        self, names: Sequence[str], part: Part, columns: Columns, *, need_text: bool = True
    ) -> Iterator[Row]:
        """The rows of one part; `names` are those of the file's layout."""
        # A file of JSON lines without one object has no names, and no row that is usable.
        chosen = ChosenColumns("", None, None)
        if names:
            chosen = _choose_columns(self.name, names, columns, need_text=need_text)
        with self._open() as file:
            if self.kind == "parquet":
                yield from parquet_rows(file, part, chosen)
                return
            file.seek(part.start)
            if self.kind == "jsonl":
                yield from jsonl_rows(file, part, chosen)
            else:
                records = csv_records(file, part) if self.kind == "csv" else tsv_records(file, part)
                yield from table_rows(records, names, chosen)

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


def _choose_columns(file: str, names: Sequence[str], columns: Columns, *, need_text: bool) -> ChosenColumns:
    smiles = _find(file, names, columns.smiles, SMILES_COLUMNS, "SMILES", "--smiles-column")
    text = None
    if need_text:
        text = _find(file, names, columns.text, TEXT_COLUMNS, "text", "--text-column")
    id_column = None
    if columns.id is not None or _match(names, ID_COLUMNS):
        id_column = _find(file, names, columns.id, ID_COLUMNS, "id", "--id-column")
    return ChosenColumns(smiles, text, id_column)


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
