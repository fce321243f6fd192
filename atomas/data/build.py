"""Pair files -> a corpus of shards: examined in parallel, split, written, published by one rename.

The bytes written depend on the files and the recipe alone, not on who did the work nor how often it was killed.
Records keep the order of the input within their split.
"""

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from atomas.data.building.assemble import (
    CORPUS,
    REJECTED_NAME,
    assemble,
    load_result,
    num_tasks,
    written_file,
)
from atomas.data.building.engine import Engine, Local, StageError, Task, run_stage
from atomas.data.building.examine import examine, scan
from atomas.data.building.plan import Input, Plan, Recipe
from atomas.data.building.resolve import resolve
from atomas.data.shard_index import FORMAT, INDEX_NAME, SplitIndex, write_index
from atomas.data.shards import Corpus
from atomas.data.sources import PairFile
from atomas.data.verify import QUARANTINE_NAME
from atomas.errors import AtomasError


@dataclass(frozen=True, kw_only=True)
class BuildOptions(Recipe):
    """How a corpus is built: what it holds (the recipe), and who does the work."""

    engine: Engine = field(default_factory=Local)
    """This node, or Slurm."""

    memory_mb: int = 2048
    """What duplicates and splits are worked out in; more goes to disk."""

    overwrite: bool = False
    """Replace a folder that is not a corpus."""


def build_corpus(
    files: Mapping[str, Sequence[str]],
    out: Path,
    options: BuildOptions,
    *,
    stage_seconds: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Build the corpus `out` from `files` (split -> pair files; `options.fractions` splits anew).

    Returns the index. Nothing appears at `out` unless the whole build succeeds. A build that was killed, or
    that ran out of disk, goes on where it was when it is started again with the same arguments. How long its
    stages took is added to `stage_seconds`. Raises AtomasError for every mistake in the input and for a disk
    that cannot be written.
    """
    _check_options(options)
    inputs = _open_inputs(files, options)
    out = Path(out).resolve()
    _check_output(out, inputs, options)
    inputs += [
        Input(name=Path(source).name, split=None, path=str(Path(source).resolve()))
        for source in options.exclude
    ]
    recipe = Recipe(**{name: getattr(options, name) for name in Recipe.__dataclass_fields__})
    plan = Plan(out.with_name(f".{out.name}.build"), inputs, recipe)
    try:
        with plan.lock():
            index = _build(plan, options, stage_seconds if stage_seconds is not None else {})
            _publish(plan.folder / CORPUS, out)
            shutil.rmtree(plan.folder)
    except OSError as error:
        kept = ""
        if any((plan.folder / "examine").glob("[0-9]*[0-9]")):
            kept = f"; what is done is kept in {plan.folder}: run the same command again to go on"
        else:
            shutil.rmtree(plan.folder, ignore_errors=True)
        raise AtomasError(
            f"cannot write {error.filename or out}: {error.strerror or error}; "
            f"make room and permissions right or choose another --out{kept}"
        ) from error
    return index


def _build(plan: Plan, options: BuildOptions, seconds: dict[str, float]) -> dict[str, Any]:
    plan.save()
    folder, stages = plan.folder, plan.folder / "stages"

    def run(
        name: str, tasks: int, task: Task, label: str, unit: str = "parts", engine: Engine = options.engine
    ) -> None:
        started = time.monotonic()
        run_stage(engine, stages / name, tasks, task, label=label, unit=unit)
        seconds[name] = time.monotonic() - started

    try:
        run("scan", len(plan.inputs), partial(scan, folder), "scanning", "files")
        run("examine", len(plan.save_parts()), partial(examine, folder), "examining")
        resolving = partial(resolve, folder, options.memory_mb)
        run("resolve", 1, resolving, "finding duplicates", "corpora", _with_memory(options))
        result = load_result(folder)
        tasks = num_tasks(plan, result)
        run("write", tasks, partial(assemble, folder), "writing shards", "shards and reports")
    except StageError:
        raise
    except AtomasError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return _finish(plan, result)


def _with_memory(options: BuildOptions) -> Engine:
    """The engine for a task that takes `memory_mb`, and some for itself."""
    if isinstance(options.engine, Local):
        return options.engine
    needed = -(-options.memory_mb // 1024) + 2
    return replace(options.engine, memory_gb=max(options.engine.memory_gb, needed))


def _finish(plan: Plan, result: Mapping[str, Any]) -> dict[str, Any]:
    """Write the index."""
    shards: dict[str, list[dict[str, Any]]] = {name: [] for name in plan.split_names}
    for number, shard in enumerate(result["shards"]):
        written = json.loads(written_file(plan.folder, number).read_text(encoding="utf-8"))
        shards[plan.split_names[shard["split"]]] += written["shards"]
    splits = {
        name: SplitIndex.from_json({"num_records": sum(one["num_records"] for one in found), "shards": found})
        for name, found in shards.items()
    }
    first_check = len(result["shards"])
    scans = [json.loads(plan.scan_file(n).read_text(encoding="utf-8")) for n in range(len(plan.pair_files))]
    return write_index(
        plan.folder / CORPUS,
        splits,
        counts=result["counts"],
        hazards=result["hazards"],
        alignment={
            one.name: json.loads(written_file(plan.folder, first_check + number).read_text(encoding="utf-8"))
            for number, one in enumerate(plan.pair_files)
        },
        sources=[
            {
                "name": one.name,
                "split": None if plan.recipe.fractions else one.split,
                "weight": one.weight,
                "bytes": scanned["bytes"],
                "sha256": scanned["sha256"],
                **found,
            }
            for one, scanned, found in zip(plan.pair_files, scans, result["sources"], strict=True)
        ],
        options={
            "columns": asdict(plan.recipe.columns),
            "fractions": dict(plan.recipe.fractions) if plan.recipe.fractions else None,
            "by": plan.recipe.by,
            "seed": plan.recipe.seed,
            "identity": plan.recipe.identity,
            "deduplicate": list(plan.recipe.deduplicate),
            "exclude": [Path(source).name for source in plan.recipe.exclude],
            "exclude_by": plan.recipe.exclude_by,
            "compression": plan.recipe.compression,
        },
    )


def _open_inputs(files: Mapping[str, Sequence[str]], options: BuildOptions) -> list[Input]:
    parsed = [(split, PairFile.parse(source)) for split, sources in files.items() for source in sources]
    if not parsed:
        raise AtomasError("no input: name a pair file, or --split train=FILE")
    paths = [
        Path(f"{file.path.resolve()}{':' if file.member else ''}{file.member or ''}") for _, file in parsed
    ]
    for path in paths:
        if paths.count(path) > 1:
            raise AtomasError(f"{path} is given twice")
    given = [source for sources in files.values() for source in sources]
    for source, weight in options.weights.items():
        if source not in given:
            raise AtomasError(f"--weight {source}={weight:g}: there is no input {source}")
        if not weight > 0:
            raise AtomasError(f"--weight {source}={weight:g}: a weight is more than 0")
    return [
        Input(name=name, split=split, path=str(path), weight=float(options.weights.get(source, 1.0)))
        for name, (split, _), path, source in zip(_distinct_names(paths), parsed, paths, given, strict=True)
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
    workers = options.engine.workers
    if workers is not None and workers < 1:
        raise AtomasError(f"--workers {workers}: at least 1 is needed")
    if options.fractions is None:
        return
    total = sum(options.fractions.values())
    if abs(total - 1) > 1e-6 or min(options.fractions.values()) <= 0:
        shown = ",".join(f"{name}={share:g}" for name, share in options.fractions.items())
        raise AtomasError(f"--fractions {shown}: fractions must be positive and sum to 1, not {total:g}")


def _check_output(out: Path, inputs: Sequence[Input], options: BuildOptions) -> None:
    for source in options.exclude:
        if Path(source).is_dir():
            Corpus.open(source)
        else:
            PairFile.parse(source)
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
        written = {INDEX_NAME, REJECTED_NAME, QUARANTINE_NAME, *index.get("splits", {})}
        written.update(index.get("tokens", {}).values())
        return index.get("format") == FORMAT and {path.name for path in out.iterdir()} <= written
    return False


def _publish(finished: Path, out: Path) -> None:
    """Put the finished folder in place; an old corpus stays whole until then."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(finished, out)
    shutil.rmtree(old, ignore_errors=True)
