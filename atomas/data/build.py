"""Pair files -> a corpus of shards: examined in parallel, split, written, published by one rename.

The bytes written depend on the files and the options alone, not on the number of processes. Records keep
the order of the input within their split.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from atomas.data.alignment_check import MAX_ROWS, check_alignment
from atomas.data.ledger import Ledger
from atomas.data.molecules import skeleton
from atomas.data.parallel import available_cores, chunked, ordered_map
from atomas.data.progress import Progress
from atomas.data.records import Accepted, Rejected, examine_rows, identity, molecule_keys
from atomas.data.shards import FORMAT, INDEX_NAME, Corpus, ShardWriter, SplitIndex, file_sha256, write_index
from atomas.data.sources import Columns, PairFile
from atomas.data.splitting import SplitBy, split_by_fractions
from atomas.errors import AtomasError

REJECTED_NAME = "rejected.jsonl"
CHUNK_ROWS = 128
ROWS_WORTH_A_WORKER = 500


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How a corpus is built."""

    columns: Columns = field(default_factory=Columns)
    """Which columns of the pair files hold SMILES, text and id."""

    fractions: Mapping[str, float] | None = None
    """Split -> its share; the shares sum to 1. None: every file names its split."""

    by: SplitBy = "random"
    """What never lies in two splits: a molecule ("random") or a Bemis-Murcko scaffold."""

    seed: int = 0
    """Of the random order of molecules."""

    exclude: Sequence[str] = ()
    """Corpora (folders) or pair files whose molecules are left out."""

    exclude_by: Literal["molecule", "skeleton"] = "molecule"
    """Compare whole InChIKeys, or their first block (leaves out stereoisomers as well)."""

    workers: int | None = None
    """Processes; None: one for every core."""

    overwrite: bool = False
    """Replace a folder that is not a corpus."""


def build_corpus(files: Mapping[str, Sequence[str]], out: Path, options: BuildOptions) -> dict[str, Any]:
    """Build the corpus `out` from `files` (split -> pair files; `options.fractions` splits anew).

    Returns the index. Nothing appears at `out` unless the whole build succeeds. Raises AtomasError for
    every mistake in the input and for a disk that cannot be written.
    """
    _check_options(options)
    inputs = _open_inputs(files)
    out = Path(out).resolve()
    _check_output(out, inputs, options)
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        index = _build(inputs, partial, options)
        _publish(partial, out)
    except OSError as error:
        raise AtomasError(
            f"cannot write {error.filename or out}: {error.strerror or error}; "
            "make room and permissions right or choose another --out"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return index


@dataclass(frozen=True, kw_only=True)
class _Input:
    """One pair file; its records call it `name`."""

    name: str
    split: str
    file: PairFile


@dataclass(frozen=True, kw_only=True)
class _Excluded:
    """Identities of the molecules to leave out -> number of the corpus that holds them."""

    molecules: dict[int, int]
    skeletons: dict[int, int]


def _build(inputs: Sequence[_Input], partial: Path, options: BuildOptions) -> dict[str, Any]:
    excluded = _read_excluded(options)
    spool = partial / "spool.jsonl"
    ledger = _examine(inputs, spool, partial / REJECTED_NAME, excluded, options)
    if not len(ledger):
        raise AtomasError(
            f"no usable pair in {', '.join(one.file.name for one in inputs)}: the corpus would be empty "
            f"({sum(ledger.rows)} rows; {ledger.first_rejection or 'no row after the header'})"
        )
    names, split = _assign_splits(ledger, inputs, options)
    alignment = _check_sources(inputs, ledger, spool)
    splits = _write_shards(spool, partial, names, split)
    spool.unlink()
    return write_index(
        partial,
        splits,
        counts=ledger.counts(split, names),
        hazards=ledger.total_hazards(split),
        alignment=alignment,
        sources=[
            {
                "name": one.name,
                "split": None if options.fractions else one.split,
                "bytes": one.file.path.stat().st_size,
                "sha256": file_sha256(one.file.path),
                "rows": ledger.rows[number],
                "rejected": ledger.rejected[number],
                "excluded": ledger.excluded[number],
                "hazards": {name: ledger.hazards[number][name] for name in sorted(ledger.hazards[number])},
            }
            for number, one in enumerate(inputs)
        ],
        options={
            "columns": asdict(options.columns),
            "fractions": dict(options.fractions) if options.fractions else None,
            "by": options.by,
            "seed": options.seed,
            "exclude": [Path(source).name for source in options.exclude],
            "exclude_by": options.exclude_by,
        },
    )


def _examine(
    inputs: Sequence[_Input], spool: Path, rejected: Path, excluded: _Excluded, options: BuildOptions
) -> Ledger:
    """Turn all rows into records (written to `spool`) and rejections (written to `rejected`)."""
    ledger = Ledger(len(inputs))
    total = sum(one.file.count_rows() for one in inputs)
    chunk_sources: list[int] = []

    def chunks() -> Iterator[tuple[Any, ...]]:
        for number, one in enumerate(inputs):
            for rows in chunked(one.file.rows(options.columns), CHUNK_ROWS):
                chunk_sources.append(number)
                yield one.name, rows, options.by == "scaffold" and options.fractions is not None

    with (
        spool.open("wb") as accepted_file,
        rejected.open("w", encoding="utf-8") as rejected_file,
        Progress("examining", total, unit="rows") as progress,
    ):
        results = ordered_map(examine_rows, chunks(), workers=_num_workers(options, total))
        for chunk, examined in enumerate(results):
            source = chunk_sources[chunk]
            for row in examined:
                outcome = _leave_out(row, excluded, options)
                if isinstance(outcome, Accepted):
                    shares_skeleton = outcome.skeleton in excluded.skeletons
                    ledger.accept(source, outcome, shares_skeleton=shares_skeleton)
                    accepted_file.write(outcome.encoded)
                else:
                    ledger.reject(source, outcome)
                    line = {
                        "file": inputs[source].name,
                        "line": outcome.line,
                        "hazard": outcome.hazard,
                        "reason": outcome.reason,
                        "row": outcome.excerpt,
                    }
                    rejected_file.write(json.dumps(line, ensure_ascii=False) + "\n")
            progress.update(len(examined))
    return ledger


def _leave_out(row: Accepted | Rejected, excluded: _Excluded, options: BuildOptions) -> Accepted | Rejected:
    if isinstance(row, Rejected):
        return row
    if options.exclude_by == "skeleton":
        corpus = excluded.skeletons.get(row.skeleton)
    else:
        corpus = excluded.molecules.get(row.molecule)
    if corpus is None:
        return row
    record = json.loads(row.encoded)
    reason = f"its {options.exclude_by} is in {Path(options.exclude[corpus]).name}"
    return Rejected(row.line, "leakage", reason, f"{record['id']}\t{record['smiles']}"[:200])


def _read_excluded(options: BuildOptions) -> _Excluded:
    excluded = _Excluded(molecules={}, skeletons={})
    for number, source in enumerate(options.exclude):
        if Path(source).is_dir():
            keys: Iterator[tuple[int, int]] = (
                (identity(record["inchikey"]), identity(skeleton(record["inchikey"])))
                for split in Corpus.open(source).splits.values()
                for record in split
            )
        else:
            keys = _molecules_of_file(PairFile.parse(source), options)
        found = 0
        for found, (molecule, skeleton_identity) in enumerate(keys, start=1):  # noqa: B007
            excluded.molecules.setdefault(molecule, number)
            excluded.skeletons.setdefault(skeleton_identity, number)
        if not found:
            raise AtomasError(f"--exclude {source} holds no valid molecule")
    return excluded


def _molecules_of_file(file: PairFile, options: BuildOptions) -> Iterator[tuple[int, int]]:
    total = file.count_rows()
    chunks = ((rows,) for rows in chunked(file.rows(Columns(), need_text=False), CHUNK_ROWS))
    with Progress(f"reading {file.path.name}", total, unit="rows") as progress:
        for keys in ordered_map(molecule_keys, chunks, workers=_num_workers(options, total)):
            yield from keys
            progress.update(CHUNK_ROWS)


def _num_workers(options: BuildOptions, rows: int) -> int:
    return min(options.workers or available_cores(), 1 + rows // ROWS_WORTH_A_WORKER)


def _assign_splits(
    ledger: Ledger, inputs: Sequence[_Input], options: BuildOptions
) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Names of the splits, and the number of each record's split."""
    if options.fractions is None:
        names = list(dict.fromkeys(one.split for one in inputs))
        split = np.array([names.index(one.split) for one in inputs])[ledger.source]
    else:
        names = list(options.fractions)
        assigned = split_by_fractions(
            ledger.molecule.tolist(),
            ledger.scaffold.tolist(),
            options.fractions,
            by=options.by,
            seed=options.seed,
        )
        split = np.array([names.index(name) for name in assigned])
    for number, name in enumerate(names):
        if not (split == number).any():
            raise AtomasError(
                f"split {name!r} would be empty ({len(ledger)} usable pairs in all; "
                f"{ledger.first_rejection or 'nothing rejected'}): give it more data or a larger fraction"
            )
    return names, split


def _check_sources(inputs: Sequence[_Input], ledger: Ledger, spool: Path) -> dict[str, Any]:
    """The alignment check of every source, on an even sample of its records."""
    samples = [ledger.distinct_rows(number, MAX_ROWS) for number in range(len(inputs))]
    wanted = set(np.concatenate(samples).tolist())
    with spool.open("rb") as file:
        records = {number: json.loads(line) for number, line in enumerate(file) if number in wanted}
    report = {}
    with Progress("checking alignment", len(inputs), unit="files") as progress:
        for one, sample in zip(inputs, samples, strict=True):
            pairs = [records[number] for number in sample.tolist()]
            result = check_alignment([pair["smiles"] for pair in pairs], [pair["text"] for pair in pairs])
            segments = np.array_split(ledger.line[sample], max(1, len(result.segment_aucs)))
            report[one.name] = asdict(result) | {
                "suspect_lines": [
                    [int(segments[number][0]), int(segments[number][-1])]
                    for number in result.suspect_segments
                ]
            }
            progress.update()
    return report


def _write_shards(
    spool: Path, partial: Path, names: Sequence[str], split: npt.NDArray[np.int64]
) -> dict[str, SplitIndex]:
    with (
        ExitStack() as stack,
        spool.open("rb") as file,
        Progress("writing shards", len(split), unit="records") as progress,
    ):
        writers = [stack.enter_context(ShardWriter(partial, name)) for name in names]
        for number, line in zip(split.tolist(), file, strict=True):
            writers[number].write_encoded(line)
            progress.update()
    return {name: writer.index() for name, writer in zip(names, writers, strict=True)}


def _open_inputs(files: Mapping[str, Sequence[str]]) -> list[_Input]:
    parsed = [(split, PairFile.parse(source)) for split, sources in files.items() for source in sources]
    if not parsed:
        raise AtomasError("no input: name a pair file, or --split train=FILE")
    paths = [
        Path(f"{file.path.resolve()}{':' if file.member else ''}{file.member or ''}") for _, file in parsed
    ]
    for path in paths:
        if paths.count(path) > 1:
            raise AtomasError(f"{path} is given twice")
    return [
        _Input(name=name, split=split, file=file)
        for name, (split, file) in zip(_distinct_names(paths), parsed, strict=True)
    ]


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """File names, with as many of their folders as make them different."""
    depth = 1
    while True:
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
        depth += 1


def _check_options(options: BuildOptions) -> None:
    if options.workers is not None and options.workers < 1:
        raise AtomasError(f"--workers {options.workers}: at least 1 is needed")
    if options.fractions is None:
        return
    total = sum(options.fractions.values())
    if abs(total - 1) > 1e-6 or min(options.fractions.values()) <= 0:
        shown = ",".join(f"{name}={share:g}" for name, share in options.fractions.items())
        raise AtomasError(f"--fractions {shown}: fractions must be positive and sum to 1, not {total:g}")


def _check_output(out: Path, inputs: Sequence[_Input], options: BuildOptions) -> None:
    for read in [one.file.path for one in inputs] + [Path(source) for source in options.exclude]:
        if out in (read.resolve(), *read.resolve().parents):
            raise AtomasError(
                f"{read} lies inside --out {out}, which would be replaced: choose another --out"
            )
    if out in (Path.cwd(), *Path.cwd().parents):
        raise AtomasError(f"--out {out} is the folder you are in (or above it): choose a folder of its own")
    if out.exists() and not out.is_dir():
        raise AtomasError(f"--out {out} is a file: choose a folder")
    if out.exists() and any(out.iterdir()) and not (_is_build(out) or options.overwrite):
        raise AtomasError(
            f"--out {out} holds files that no build wrote: choose another folder, "
            "or add --overwrite to delete it"
        )


def _is_build(out: Path) -> bool:
    """Whether `out` holds a corpus and nothing else."""
    with suppress(OSError, ValueError, AttributeError):
        index = json.loads((out / INDEX_NAME).read_text(encoding="utf-8"))
        written = {INDEX_NAME, REJECTED_NAME, *index.get("splits", {})}
        written.update(index.get("tokens", {}).values())
        return index.get("format") == FORMAT and {path.name for path in out.iterdir()} <= written
    return False


def _publish(partial: Path, out: Path) -> None:
    """Put the finished folder in place; an old corpus stays whole until then."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(partial, out)
    shutil.rmtree(old, ignore_errors=True)
