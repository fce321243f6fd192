"""`atomas data leakage`: which rows of evaluation sets are in a training corpus, by molecule, skeleton or text.

The corpus is read once; identities of both sides are joined by DuckDB, which goes to disk when memory is short.
"""

import glob
import json
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table

from atomas.data.building.database import batches, open_database
from atomas.data.molecules import IdentityKind
from atomas.data.parallel import available_cores, chunked, ordered_map
from atomas.data.progress import Progress
from atomas.data.records import Keys, record_keys, reference_keys
from atomas.data.report import make_console
from atomas.data.row_formats import Row
from atomas.data.shards import Corpus, ShardedSplit
from atomas.data.sources import Columns, PairFile
from atomas.errors import AtomasError
from atomas.json_files import write_json

CHUNK_ROWS = 256
By = Literal["molecule", "skeleton", "text"]
BYS: tuple[By, ...] = ("molecule", "skeleton", "text")


@dataclass(frozen=True, kw_only=True)
class Leak:
    """Row `row` of an evaluation set (line of a file; number of the record in a split of a corpus) is in the corpus."""

    set: str
    row: int
    by: tuple[By, ...]


@dataclass(frozen=True, kw_only=True)
class Leakage:
    """Of an evaluation set: its rows with a valid molecule, and how many of them the corpus holds.

    `skeleton` is None where the corpus was built with `--identity smiles`, which knows none. `clean`: rows whose
    molecule, skeleton and text are all unknown to the corpus.
    """

    set: str
    rows: int
    molecule: int
    skeleton: int | None
    text: int
    clean: int


def find_leakage(
    directory: Path, evaluation_sets: Sequence[str], *, split: str = "train", workers: int | None = None,
    memory_mb: int = 2048,
) -> Iterator[Leakage | Leak]:  # fmt: skip
    """For each evaluation set (corpora, SET:SPLIT of a corpus, or pair files) its Leakage, then its leaked rows.

    Raises AtomasError if one cannot be read, or was built with another identity than the corpus.
    """
    corpus = Corpus.open(directory)
    kind: IdentityKind = corpus.index["options"].get("identity", "inchikey")
    workers = workers or available_cores()
    sets = [(name, _open_set(name, kind)) for name in evaluation_sets]
    with tempfile.TemporaryDirectory(prefix="atomas-leakage-") as name:
        folder = Path(name)
        # All reading comes first: worker processes are forked, and DuckDB has threads.
        files = [_spill(folder / "corpus", _split_keys(corpus.split(split), workers))]
        files += [
            _spill(folder / f"set-{number}", _set_keys(one, kind, workers))
            for number, (_, one) in enumerate(sets)
        ]
        with open_database(folder / "leakage.duckdb", memory_mb) as database:
            yield from _compare(database, files, evaluation_sets, kind)


def _compare(
    database: Any, files: Sequence[str], names: Sequence[str], kind: IdentityKind
) -> Iterator[Leakage | Leak]:
    """`files`: SQL for the identities of the corpus, then for those of every set."""
    for by in BYS:
        database.execute(f"CREATE TABLE known_{by} AS SELECT DISTINCT {by} FROM {files[0]} WHERE {by} != 0")
    for name, path in zip(names, files[1:], strict=True):
        flags = ", ".join(f"{by} IN (SELECT {by} FROM known_{by}) AS by_{by}" for by in BYS)
        database.execute(f"CREATE OR REPLACE TABLE found AS SELECT row, {flags} FROM {path}")
        sums = ", ".join(f"count(*) FILTER (by_{by})" for by in BYS)
        clean = "count(*) FILTER (NOT (by_molecule OR by_skeleton OR by_text))"
        rows, molecule, skeleton, text, clean_rows = database.execute(
            f"SELECT count(*), {sums}, {clean} FROM found"
        ).fetchone()
        if not rows:
            raise AtomasError(f"{name} holds no valid molecule")
        yield Leakage(
            set=name, rows=rows, molecule=molecule, text=text, clean=clean_rows,
            skeleton=skeleton if kind == "inchikey" else None,
        )  # fmt: skip
        query = (
            "SELECT row, by_molecule::BIGINT, by_skeleton::BIGINT, by_text::BIGINT FROM found "
            "WHERE by_molecule OR by_skeleton OR by_text ORDER BY row"
        )
        for columns in batches(database, query):
            for row, *known in zip(*(column.tolist() for column in columns), strict=True):
                by_what = tuple(by for by, is_known in zip(BYS, known, strict=True) if is_known)
                yield Leak(set=name, row=row, by=by_what)


def write_report(
    directory: Path,
    evaluation_sets: Sequence[str],
    *,
    split: str = "train",
    rows: Path | None = None,
    counts: Path | None = None,
    workers: int | None = None,
) -> list[Leakage]:
    """Print a table; write every leaked row to `rows` (JSON lines) and the counts to `counts` (JSON)."""
    found: list[Leakage] = []
    try:
        with rows.open("w", encoding="utf-8") if rows else nullcontext() as file:
            for one in find_leakage(directory, evaluation_sets, split=split, workers=workers):
                if isinstance(one, Leakage):
                    found.append(one)
                elif file is not None:
                    file.write(json.dumps(asdict(one)) + "\n")
        if counts:
            write_json(
                counts, {"corpus": str(directory), "split": split, "sets": [asdict(one) for one in found]}
            )
    except OSError as error:
        raise AtomasError(f"cannot write {error.filename or rows}: {error.strerror or error}") from error
    make_console().print(_table(f"In {directory}, split {split}", found))
    return found


def _table(title: str, found: Sequence[Leakage]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("evaluation set", overflow="fold")
    for name in ("rows", "same molecule", "same skeleton", "same text", "none of them"):
        table.add_column(name, justify="right")
    for one in found:
        counts = (one.rows, one.molecule, one.skeleton, one.text, one.clean)
        table.add_row(one.set, *("-" if number is None else f"{number:,}" for number in counts))
    return table


def _open_set(name: str, kind: IdentityKind) -> ShardedSplit | PairFile:
    """A pair file, or a split of a corpus (DIR:SPLIT; DIR where it has one split)."""
    folder, _, split = name.rpartition(":")
    if not Path(name).is_dir() and not (folder and Path(folder).is_dir()):
        return PairFile.parse(name)
    corpus = Corpus.open(name if Path(name).is_dir() else folder)
    built_with = corpus.index["options"].get("identity", "inchikey")
    if built_with != kind:
        raise AtomasError(
            f"{name} was built with --identity {built_with}, the corpus with {kind}: their molecules cannot be compared"
        )
    if not Path(name).is_dir():
        return corpus.split(split)
    if len(corpus.splits) > 1:
        raise AtomasError(f"{name} has the splits {', '.join(corpus.splits)}: name one as {name}:SPLIT")
    return next(iter(corpus.splits.values()))


def _set_keys(one: ShardedSplit | PairFile, kind: IdentityKind, workers: int) -> Iterator[tuple[int, Keys]]:
    if isinstance(one, ShardedSplit):
        yield from _split_keys(one, workers)
        return
    with Progress(f"reading {one.path.name}", None, unit="rows") as progress:
        arguments = ((rows, kind) for rows in chunked(_rows(one), CHUNK_ROWS))
        for found in ordered_map(_row_keys, arguments, workers=workers):
            yield from found
            progress.update(len(found))


def _rows(file: PairFile) -> Iterator[Row]:
    """Its rows; with texts where it has them."""
    rows = file.rows(Columns())
    try:
        first = next(rows, None)
    except AtomasError:
        rows = file.rows(Columns(), need_text=False)
        first = next(rows, None)
    if first is not None:
        yield first
    yield from rows


def _row_keys(rows: Sequence[Row], kind: IdentityKind) -> list[tuple[int, Keys]]:
    found = ((row.line, reference_keys(row, kind)) for row in rows)
    return [(line, keys) for line, keys in found if keys is not None]


def _split_keys(split: ShardedSplit, workers: int) -> Iterator[tuple[int, Keys]]:
    number = 0
    with Progress(f"reading {split.name}", split.num_records, unit="records") as progress:
        blocks = ((split, block) for block in range(len(split.blocks)))
        for found in ordered_map(_block_keys, blocks, workers=workers):
            yield from ((number + place, keys) for place, keys in enumerate(found))
            number += len(found)
            progress.update(len(found))


def _block_keys(split: ShardedSplit, block: int) -> list[Keys]:
    return [record_keys(record["inchikey"], record["text"]) for record in split.read_block(block)]


def _spill(folder: Path, keys: Iterator[tuple[int, Keys]]) -> str:
    """Identities into Parquet files, some hundred thousand rows in each; returns the SQL that reads them all."""
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir()
    for number, chunk in enumerate(chunked(keys, 2**17)):
        columns = {name: array("q") for name in ("row", *BYS)}
        for row, found in chunk:
            for column, value in zip(
                columns.values(), (row, found.molecule, found.skeleton, found.text), strict=True
            ):
                column.append(value)
        table = pa.table({name: np.asarray(column, dtype=np.int64) for name, column in columns.items()})
        parquet.write_table(table, folder / f"{number:06d}.parquet")
    if not any(folder.iterdir()):
        empty = {name: np.zeros(0, dtype=np.int64) for name in ("row", *BYS)}
        parquet.write_table(pa.table(empty), folder / "000000.parquet")
    names = f"{glob.escape(str(folder))}/*.parquet".replace("'", "''")
    return f"read_parquet('{names}')"
