"""`atomas bench data-build`: how fast pair files become a corpus, beside RDKit alone on the same molecules."""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

DESCRIPTION = (
    "Rows per second of `atomas data build`, beside what RDKit alone (parse, canonical SMILES, InChIKey where that\n"
    "is the identity) does in the same process with the same molecules, in turns. `examine` is the work of a build's\n"
    "processes, from the file to records and identities on disk, in processor time; its parts say where the rest\n"
    "goes. Then whole builds, with their stages, on as many processes as asked for, beside RDKit alone in as many."
)
EXAMPLE = "chebi20/validation.txt --rows 3000 --workers 1 2 --json docs/results/data/build.json"
Identity = Any


@dataclass(frozen=True, kw_only=True)
class Examined:
    """Processor time per row, in microseconds, and rates per second of it."""

    source: str
    identity: str
    rows: int
    rdkit_rows_per_s: float
    examine_rows_per_s: float
    share_of_rdkit: float
    microseconds: dict[str, float]
    """rdkit, then what examining needs besides: read, text, keys, encode, and the rest (hazards, files)."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """A whole build: seconds on the clock, by stage, beside RDKit alone in as many processes."""

    source: str
    identity: str
    workers: int
    rows: int
    seconds: float
    rows_per_s_per_core: float
    rdkit_rows_per_s_per_core: float
    share_of_rdkit: float
    stages: dict[str, float] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add(
        "files",
        nargs="+",
        metavar="FILE",
        help="pair files; NAME,NAME=FILE names the columns of one without a header",
    )
    add("--rows", type=int, default=3000, metavar="N", help="rows taken, evenly spaced (default: 3000)")
    add(
        "--workers",
        type=int,
        nargs="*",
        default=[1],
        metavar="W",
        help="processes of the whole builds, none for none (default: 1)",
    )
    add(
        "--rounds",
        type=int,
        default=2,
        metavar="R",
        help="turns over the rows; the fastest counts (default: 2)",
    )
    add("--json", type=Path, metavar="FILE", required=True, help="the report, written after every row")


def run(options: argparse.Namespace) -> None:
    """Measure, print and write the report."""
    import torch

    from atomas.errors import AtomasError
    from atomas_kernels.bench import report as kernels_report

    head = kernels_report.head(torch.device("cpu"), ("rdkit", "datatrove", "duckdb")) | {
        "benchmark": "data-build"
    }
    try:
        report = kernels_report.Report(options.json, head)
    except ValueError as error:
        raise AtomasError(str(error)) from error
    for given in options.files:
        with tempfile.TemporaryDirectory(prefix="atomas-bench-") as name:
            folder = Path(name)
            source = take_rows(given, options.rows, folder)
            for identity in ("inchikey", "smiles"):
                examined = _in_process(measure_examine, source, identity, options.rounds, folder)
                report.add({"kind": "examine", **asdict(examined)})
                print(
                    f"{examined.source}, {identity}: examine {examined.examine_rows_per_s:.0f} rows/s, RDKit "
                    f"{examined.rdkit_rows_per_s:.0f}: {examined.share_of_rdkit:.0%}"
                )
                for workers in options.workers:
                    built = _in_process(measure_build, source, identity, workers, folder)
                    report.add({"kind": "build", **asdict(built)})
                    print(
                        f"{built.source}, {identity}: on {workers}: {built.rows_per_s_per_core:.0f} rows/s a core, "
                        f"RDKit {built.rdkit_rows_per_s_per_core:.0f}: {built.share_of_rdkit:.0%}"
                    )
    print(options.json)


def take_rows(given: str, count: int, folder: Path) -> Path:
    """`count` evenly spaced rows of a pair file, as a TSV in `folder`."""
    from atomas.data.sources import Columns, PairFile
    from atomas.errors import AtomasError

    names, separator, path = given.rpartition("=")
    columns = Columns(header=tuple(names.split(",")) if separator else None)
    file = PairFile.parse(path)
    rows = [row for row in file.rows(columns) if not row.problem]
    if not rows:
        raise AtomasError(f"{path} has no rows")
    count = min(count, len(rows))
    target = folder / f"{Path(path.replace(':', '-')).parent.name}-{file.path.stem}.tsv"
    with target.open("w", encoding="utf-8") as out:
        out.write("id\tsmiles\ttext\n")
        for number in range(count):
            row = rows[number * len(rows) // count]
            out.write(f"{row.id or row.line}\t{row.smiles}\t{row.text}\n")
    return target


def _in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """In a process of its own, which has loaded nothing else and may have children."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure_examine(source: Path, identity: Identity, rounds: int, folder: Path) -> Examined:
    """The two stages that read rows, part by part, in turns with RDKit alone on the rows of the part."""
    from atomas.data.building import examine, plan
    from atomas.data.records import record_keys
    from atomas.data.shard_writer import encode_record
    from atomas.data.texts import clean_text

    work = folder / f"examine-{identity}"
    work.mkdir()
    one = plan.Input(name=source.name, split="train", path=str(source))
    planned = plan.Plan(work, [one], plan.Recipe(identity=identity))
    planned.save()
    examine.scan(work, 0)
    parts = planned.save_parts()
    best: dict[str, float] = {}
    total = 0
    for _ in range(rounds):
        spent = dict.fromkeys(("rdkit", "examine", "read", "text", "keys", "encode"), 0.0)
        total = 0
        for number, part in enumerate(parts):
            with _Timer(spent, "read"):
                rows = list(one.file.read(part.names, part.part, planned.recipe.columns))
            with _Timer(spent, "rdkit"):
                rdkit_alone([row.smiles for row in rows], identity)
            with _Timer(spent, "examine"):
                examine.examine(work, number)
            with _Timer(spent, "text"):
                for row in rows:
                    clean_text(row.text)
            with _Timer(spent, "keys"):
                for row in rows:
                    record_keys(row.smiles, row.text)
            with _Timer(spent, "encode"):
                for row in rows:
                    encode_record(
                        {"id": row.id, "smiles": row.smiles, "canonical_smiles": row.smiles, "text": row.text}
                    )
            total += len(rows)
        best = {name: min(seconds, best.get(name, seconds)) for name, seconds in spent.items()}
    rest = best["examine"] - sum(best[name] for name in ("rdkit", "read", "text", "keys", "encode"))
    per_row = {name: 1e6 * best[name] / total for name in ("rdkit", "read", "text", "keys", "encode")}
    return Examined(
        source=source.stem,
        identity=identity,
        rows=total,
        rdkit_rows_per_s=total / best["rdkit"],
        examine_rows_per_s=total / best["examine"],
        share_of_rdkit=best["rdkit"] / best["examine"],
        microseconds={**per_row, "rest": 1e6 * rest / total},
    )


def measure_build(source: Path, identity: Identity, workers: int, folder: Path) -> Built:
    """RDKit alone in `workers` processes, then the whole build, on the clock."""
    from atomas.data.build import BuildOptions, build_corpus
    from atomas.data.building.engine import Local
    from atomas.data.sources import Columns, PairFile
    from atomas.errors import AtomasError

    smiles = [row.smiles for row in PairFile.parse(str(source)).rows(Columns())]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        chunks = [(chunk, identity) for chunk in _chunks(smiles, 200)]
        pool.starmap(rdkit_alone, chunks[:workers], chunksize=1)  # imports
        started = time.perf_counter()
        pool.starmap(rdkit_alone, chunks, chunksize=1)
        alone = time.perf_counter() - started
    stages: dict[str, float] = {}
    options = BuildOptions(engine=Local(workers=workers), identity=identity)
    started = time.perf_counter()
    index = build_corpus({"train": [str(source)]}, folder / "corpus", options, stage_seconds=stages)
    seconds = time.perf_counter() - started
    if index["counts"]["rows"] != len(smiles):
        raise AtomasError(f"{source.name}: {len(smiles)} rows, {index['counts']['rows']} built")
    return Built(
        source=source.stem,
        identity=identity,
        workers=workers,
        rows=len(smiles),
        seconds=seconds,
        rows_per_s_per_core=len(smiles) / seconds / workers,
        rdkit_rows_per_s_per_core=len(smiles) / alone / workers,
        share_of_rdkit=alone / seconds,
        stages=stages,
    )


def rdkit_alone(smiles: Sequence[str], identity: Identity) -> None:
    """What no build can do without: every molecule parsed, its canonical SMILES, its InChIKey if asked for."""
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        for one in smiles:
            mol = Chem.MolFromSmiles(one)
            if mol is not None:
                Chem.MolToSmiles(mol)
                if identity == "inchikey":
                    Chem.MolToInchiKey(mol)


class _Timer:
    """Adds the processor time of a block to `spent[name]`."""

    def __init__(self, spent: dict[str, float], name: str) -> None:
        self._spent, self._name = spent, name

    def __enter__(self) -> None:
        self._started = time.process_time()

    def __exit__(self, *_: object) -> None:
        self._spent[self._name] += time.process_time() - self._started


def _chunks(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (items[start : start + size] for start in range(0, len(items), size))
