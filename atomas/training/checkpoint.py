"""Checkpoints that exist whole or not at all.

A checkpoint is written into `step_N.partial`; when all files are there and on the disk, `manifest.json` with the size
and SHA-256 of every one is added and the folder is renamed to `step_N`. So a folder of that name is complete, whenever
the run was killed. Nothing of it is DeepSpeed's, whose files belong to one world size and one ZeRO stage, and nothing
is a pickle. `snapshot` says what is written, `saver` when.

    step_00000100/manifest.json     what is in here
                  trainer.json      step, position in the data, fingerprints, metrics
                  shards/           fp32 masters, moments, momentum masters: one file per rank (`shard_files`)
                  rng/rank_0000.safetensors
                  queue.safetensors
                  model/            fp32 weights, online and momentum, configuration and tokenizer
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from atomas.disk import sync, sync_folders
from atomas.distributed.agreement import from_rank_zero, together
from atomas.distributed.collectives import rank
from atomas.errors import AtomasError
from atomas.training.tensor_files import sha256, to_disk

FORMAT = "atomas-checkpoint/2"
MANIFEST = "manifest.json"


class FileEntry(TypedDict):
    """What the manifest says of a file."""

    bytes: int
    sha256: str


def file_entries(paths: Mapping[str, Path]) -> dict[str, FileEntry]:
    """Force files to the disk, and read size and hash back from there. Their names are for `sync_folders` to force.

    Raises:
        OSError: one cannot be read.
    """
    for path in paths.values():
        to_disk(path)
    return {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in paths.items()}


def files_below(folder: Path) -> dict[str, Path]:
    """Path of every file by its name relative to `folder`."""
    return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}


def publish(partial: Path, final: Path, step: int, known: Mapping[str, FileEntry] | None = None) -> None:
    """Make the files in `partial` the checkpoint `final`: manifest, then rename. One process.

    `known` holds entries of files that whoever wrote them has read back already.

    Raises:
        OSError: a file cannot be written, or has another size than is known.
    """
    paths = files_below(partial)
    files = dict(known or {})
    for name, entry in files.items():
        if name not in paths or paths[name].stat().st_size != entry["bytes"]:
            raise OSError(f"{partial / name} is not there as its rank has written it; is the folder shared?")
    files |= file_entries({name: path for name, path in paths.items() if name not in files})
    manifest = partial / MANIFEST
    manifest.write_text(_manifest(step, files), encoding="utf-8")
    to_disk(manifest)
    sync_folders([manifest, *paths.values()], top=partial)
    partial.rename(final)
    sync(final.parent)  # the rename itself must survive a power cut


def _manifest(step: int, files: Mapping[str, FileEntry]) -> str:
    """The text of a manifest: the only one for its content, with a digest of its own."""
    content = {"format": FORMAT, "step": step, "files": {name: files[name] for name in sorted(files)}}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps(content | {"digest": digest}, indent=1) + "\n"


def verify_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Compare every file with the manifest and return the manifest.

    Raises:
        AtomasError: names the first file that is missing, has another size or other content.
    """
    try:
        text = (checkpoint / MANIFEST).read_text(encoding="utf-8")
        manifest: dict[str, Any] = json.loads(text)
    except FileNotFoundError:
        raise AtomasError(f"{checkpoint} is not a checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise AtomasError(
            f"checkpoint {checkpoint.name} is damaged: {checkpoint / MANIFEST}: {error}"
        ) from None
    if manifest.get("format") != FORMAT:
        raise AtomasError(
            f"checkpoint {checkpoint.name}: {checkpoint / MANIFEST} has format {manifest.get('format')!r}, "
            f"not {FORMAT!r}"
        )
    if text != _manifest(manifest.get("step", 0), manifest.get("files", {})):
        raise AtomasError(
            f"checkpoint {checkpoint.name} is damaged: {checkpoint / MANIFEST} has changed since it was written"
        )
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
            changed = sha256(path) != entry["sha256"]
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


def checkpoint_name(step: int) -> str:
    """Folder of the checkpoint of a step."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that a checkpoint has seen, from its name."""
    return int(checkpoint.name.removeprefix("step_"))


def resolve_checkpoint(path: Path, *, best: bool = False) -> Path:
    """A checkpoint's folder, or a run folder whose newest checkpoint (or the one that BEST names) is meant.

    Raises:
        AtomasError: there is none.
    """
    if (path / MANIFEST).is_file():
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


def newest_good_checkpoint(
    folder: Path,
    latest: str | None,
    warn: Callable[[str], None],
    *,
    in_doubt: Callable[[Path], bool] = lambda checkpoint: False,
) -> Path | None:
    """The newest checkpoint that is whole; whatever is wrong with newer ones goes to `warn`. Same on all ranks.

    Newer ones get the ending `.damaged` or `.in_doubt`, so that their step can be saved anew.

    Args:
        folder: the run's `checkpoints` folder.
        latest: name of the checkpoint that was published last, as the run remembers it.
        warn: told each problem on rank 0.
        in_doubt: says of a whole one that it is not to be taken all the same.

    Returns:
        None where the run has published no checkpoint yet, or none but those in doubt.

    Raises:
        AtomasError: there were checkpoints, and none is whole: never a silent fresh start.
    """
    outcome: tuple[str | None, str | None] = (None, None)
    with together("reading the newest checkpoint"):  # its hashes may take longer than a collective may wait
        if rank() == 0:
            try:
                outcome = _choose(folder, latest, warn, in_doubt)
            except OSError as error:
                outcome = (None, f"{folder} cannot be read: {error}")
    chosen, problem = from_rank_zero(outcome)
    if problem is not None:
        raise AtomasError(problem)
    return None if chosen is None else Path(chosen)


def prune_checkpoints(
    folder: Path,
    *,
    keep_last: int,
    keep_every: int,
    best: Path | None,
    in_doubt: Callable[[Path], bool] = lambda checkpoint: False,
) -> None:
    """Remove checkpoints; one process.

    What stays: the newest `keep_last`, and the newest one that is not `in_doubt`, so that there is a way back; the best
    one; and of every `keep_every` steps the first, which may have been put off for some steps.
    """
    found = list_checkpoints(folder)
    sound = next((checkpoint for checkpoint in found if not in_doubt(checkpoint)), None)
    period = 0
    for old in reversed(found):
        former, period = period, step_of(old) // keep_every if keep_every else 0
        if old in found[:keep_last] or old == sound or period > former:
            continue
        if best is None or old.resolve() != best.resolve():
            # first out of the name that means "complete": a removal that is cut off leaves nothing that looks whole
            doomed = old.with_name(f"{old.name}.removed")
            old.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _choose(
    folder: Path, latest: str | None, warn: Callable[[str], None], in_doubt: Callable[[Path], bool]
) -> tuple[str | None, str | None]:
    for leftover in [*folder.glob("*.partial"), *folder.glob("*.removed")]:
        shutil.rmtree(leftover, ignore_errors=True)
    found = list_checkpoints(folder)
    problems = []
    endings: dict[Path, str] = {}
    if latest is not None and not (folder / latest).exists():
        problems.append(f"the newest checkpoint, {folder / latest}, is missing")
        warn(f"{problems[0]}; looking for an older one")
    for checkpoint in found:
        try:
            verify_checkpoint(checkpoint)
        except AtomasError as error:
            problems.append(str(error))
            warn(f"{error}; trying the checkpoint before it")
            endings[checkpoint] = "damaged"
            continue
        if in_doubt(checkpoint):
            endings[checkpoint] = "in_doubt"
            continue
        for newer, ending in endings.items():
            aside = newer.with_name(f"{newer.name}.{ending}")
            shutil.rmtree(aside, ignore_errors=True)
            newer.rename(aside)
        return str(checkpoint), None
    if problems and "in_doubt" not in endings.values():
        return None, (
            f"no checkpoint in {folder} is whole ({problems[0]}); restore one, or start a new run with another "
            "run.name"
        )
    return None, None
