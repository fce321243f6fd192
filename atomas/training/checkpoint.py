"""Checkpoints that exist whole or not at all.

A checkpoint is written into `step_N.partial`, every rank its part; after a barrier rank 0 writes `manifest.json`
with the size and SHA-256 of every file and renames the folder to `step_N`. So a folder of that name is complete,
whenever the run was killed. Nothing of it is DeepSpeed's, whose files belong to one world size and one ZeRO stage, and
whose save leaves the other ranks waiting where one cannot write.

    step_00000100/manifest.json     what is in here
                  trainer.json      step, position in the data, fingerprints, metrics
                  shards/           fp32 masters, moments, momentum masters: one file per rank (`shard_files`)
                  rng/rank_0000.safetensors
                  queue.safetensors
                  model/            fp32 weights, online and momentum, configuration and tokenizer
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from atomas.distributed.agreement import from_rank_zero, together
from atomas.distributed.collectives import rank
from atomas.errors import AtomasError
from atomas.json_files import write_json

FORMAT = "atomas-checkpoint/1"


def save_checkpoint(
    folder: Path,
    step: int,
    write_part: Callable[[Path], None],
    write_rest: Callable[[Path], None],
    *,
    device: torch.device,
) -> Path:
    """Publish `folder/step_N`, on all ranks.

    Args:
        folder: the run's `checkpoints` folder.
        step: optimizer steps done.
        write_part: writes this rank's files below the path it is given; called on every rank, not collective.
        write_rest: called on rank 0 when all parts are there, which it may read.
        device: where the process group's tensors live.

    Raises:
        AtomasError: a rank could not write; the unfinished folder is removed and older checkpoints stay.
    """
    final = folder / f"step_{step:08d}"
    partial = folder / f"step_{step:08d}.partial"
    if final.exists():
        return final
    with together("preparing the checkpoint", device):
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    try:
        with together(f"writing checkpoint {final.name}", device):
            write_part(partial)
        with together(f"completing checkpoint {final.name}", device):
            if rank() == 0:
                write_rest(partial)
        with together(f"publishing checkpoint {final.name}", device):
            if rank() == 0:
                publish(partial, final, step)
    except Exception:
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def publish(partial: Path, final: Path, step: int) -> None:
    """Make the files in `partial` the checkpoint `final`: manifest, then rename. One process."""
    files = {}
    for path in sorted(p for p in partial.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(partial).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    write_json(partial / "manifest.json", {"format": FORMAT, "step": step, "files": files})
    partial.rename(final)
    parent = os.open(final.parent, os.O_RDONLY)
    os.fsync(parent)  # the rename itself must survive a power cut
    os.close(parent)


def verify_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Compare every file with the manifest and return the manifest.

    Raises:
        AtomasError: names the first file that is missing, has another size or other content.
    """
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AtomasError(f"{checkpoint} is not a checkpoint: it has no manifest.json") from None
    except (OSError, ValueError) as error:
        raise AtomasError(f"{checkpoint}/manifest.json cannot be read: {error}") from None
    if manifest.get("format") != FORMAT:
        raise AtomasError(f"{checkpoint}/manifest.json has format {manifest.get('format')!r}, not {FORMAT!r}")
    for name, entry in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            raise AtomasError(f"checkpoint {checkpoint.name} is damaged: {path} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise AtomasError(
                f"checkpoint {checkpoint.name} is damaged: {path} has {path.stat().st_size} bytes, "
                f"not {entry['bytes']}"
            )
        try:
            changed = _sha256(path) != entry["sha256"]
        except OSError as error:
            raise AtomasError(f"checkpoint {checkpoint.name} cannot be read: {error}") from None
        if changed:
            raise AtomasError(
                f"checkpoint {checkpoint.name} is damaged: {path} has changed since it was written"
            )
    return manifest


def list_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, newest first."""
    return sorted((p for p in folder.glob("step_????????") if p.is_dir()), reverse=True)


def resolve_checkpoint(path: Path, *, best: bool = False) -> Path:
    """A checkpoint's folder, or a run folder whose newest checkpoint (or the one that BEST names) is meant.

    Raises:
        AtomasError: there is none.
    """
    if (path / "manifest.json").is_file():
        return path.resolve()
    if not path.is_dir():
        raise AtomasError(f"checkpoint {path} does not exist")
    found = list_checkpoints(path / "checkpoints")
    if not found:
        raise AtomasError(f"{path} is neither a checkpoint nor a run folder with one in checkpoints/")
    if not best:
        return found[0]
    try:
        name = (path / "BEST").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise AtomasError(
            f"{path} has no BEST checkpoint: it was never evaluated; leave --best out"
        ) from None
    return resolve_checkpoint(path / "checkpoints" / name)


def newest_good_checkpoint(folder: Path, latest: str | None, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; whatever is wrong with newer ones goes to `warn`. Same on all ranks.

    Damaged ones get the ending `.damaged`, so that their step can be saved anew.

    Args:
        folder: the run's `checkpoints` folder.
        latest: name of the checkpoint that was published last, as the run remembers it.
        warn: told each problem on rank 0.

    Returns:
        None where the run has published no checkpoint yet.

    Raises:
        AtomasError: there were checkpoints, and none is whole: never a silent fresh start.
    """
    outcome: tuple[str | None, str | None] = (None, None)
    if rank() == 0:
        try:
            outcome = _choose(folder, latest, warn)
        except OSError as error:
            outcome = (None, f"{folder} cannot be read: {error}")
    chosen, problem = from_rank_zero(outcome)
    if problem is not None:
        raise AtomasError(problem)
    return None if chosen is None else Path(chosen)


def prune_checkpoints(folder: Path, keep_last: int, best: Path | None) -> None:
    """Remove all but the newest `keep_last` and the best one; call on rank 0."""
    for old in list_checkpoints(folder)[keep_last:]:
        if best is None or old.resolve() != best.resolve():
            # first out of the name that means "complete": a removal that is cut off leaves nothing that looks whole
            doomed = old.with_name(f"{old.name}.removed")
            old.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _choose(folder: Path, latest: str | None, warn: Callable[[str], None]) -> tuple[str | None, str | None]:
    for leftover in [*folder.glob("*.partial"), *folder.glob("*.removed")]:
        shutil.rmtree(leftover, ignore_errors=True)
    found = list_checkpoints(folder)
    problems = []
    if latest is not None and not (folder / latest).exists():
        problems.append(f"the newest checkpoint, {folder / latest}, is missing")
        warn(f"{problems[0]}; looking for an older one")
    for checkpoint in found:
        try:
            verify_checkpoint(checkpoint)
        except AtomasError as error:
            problems.append(str(error))
            warn(f"{error}; trying the checkpoint before it")
            continue
        for damaged in found[: found.index(checkpoint)]:
            shutil.rmtree(damaged.with_name(f"{damaged.name}.damaged"), ignore_errors=True)
            damaged.rename(damaged.with_name(f"{damaged.name}.damaged"))
        return str(checkpoint), None
    if problems:
        return None, (
            f"no checkpoint in {folder} is whole ({problems[0]}); restore one, or start a new run with another "
            "run.name"
        )
    return None, None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
