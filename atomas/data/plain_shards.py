"""Shards of other projects, one sample per key, read where they lie after one pass that writes their index.

A plain WebDataset tar holds each sample as consecutive members of one name and several extensions:

    000017.smi  or .smiles             SMILES: the first word of the first line
    000017.txt  or .text, .caption     text
    000017.json                        an object whose keys are as the columns of a pair file, but for what is above

The index cuts a tar into blocks of up to 256 whole samples, which are runs of its bytes. A sample that cannot be used
is in no block, so that every block holds good ones only; `rejected.jsonl` says why.
"""

import hashlib
import io
import json
import posixpath
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atomas.data.blocks import PLAIN_SUFFIX, Block, BlockTable
from atomas.data.molecules import InvalidMoleculeError, parse_molecule
from atomas.data.parallel import available_cores, ordered_map
from atomas.data.progress import Progress
from atomas.data.shard_index import INDEX_NAME, Shard, SplitIndex, file_sha256, write_index
from atomas.data.shard_writer import BLOCK_SIZE
from atomas.data.shards import Record
from atomas.data.sources import ID_COLUMNS, SMILES_COLUMNS, TEXT_COLUMNS
from atomas.data.verify import QUARANTINE_NAME
from atomas.errors import AtomasError

REJECTED_NAME = "rejected.jsonl"
SMILES_EXTENSIONS = ("smi", "smiles")
TEXT_EXTENSIONS = ("txt", "text", "caption")


class UnusableSampleError(ValueError):
    """A sample has no SMILES or no text, or one that is not valid; the message says which."""


@dataclass(frozen=True, kw_only=True)
class _Sample:
    key: str
    start: int
    """Byte of the tar at which its first header stands"""
    stop: int
    files: dict[str, bytes]
    """Extension -> content"""


def index_shards(directory: Path, *, workers: int | None = None) -> dict[str, Any]:
    """Write `directory/index.json` for the tars in it, those of its sub-folders being splits; returns the index.

    Tars that lie in `directory` itself are the split `train`. Every sample is checked once, by `workers` processes.
    Raises AtomasError where there is an index already, no tar or no usable sample, or a tar that cannot be read.
    """
    if (directory / INDEX_NAME).exists():
        raise AtomasError(
            f"{directory} has an {INDEX_NAME} already: remove it to have the shards indexed anew"
        )
    tars = _find_tars(directory)
    arguments = [(directory, path) for paths in tars.values() for path in paths]
    results = ordered_map(_index_shard, arguments, workers=min(workers or available_cores(), len(arguments)))
    splits, rejected = {}, []
    with Progress("indexing", len(arguments), unit="shards") as progress:
        for split, paths in tars.items():
            shards, first = [], 0
            for _ in paths:
                shard, bad = next(results)
                shard = _numbered(shard, first)
                first += len(shard.blocks)
                shards.append(shard)
                rejected += bad
                progress.update()
            shards = [shard for shard in shards if len(shard.blocks)]
            if not shards:
                reason = rejected[0]["reason"] if rejected else "there is none"
                raise AtomasError(
                    f"no sample of split {split!r} of {directory} can be used (the first: {reason})"
                )
            count = sum(shard.num_records for shard in shards)
            splits[split] = SplitIndex(num_records=count, shards=tuple(shards))
    kept = sum(split.num_records for split in splits.values())
    try:
        with (directory / REJECTED_NAME).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in rejected)
        return write_index(
            directory, splits, counts={"rows": kept + len(rejected), "rejected": len(rejected)},
            hazards={}, sources=[], options={"indexed": True},
        )  # fmt: skip
    except OSError as error:
        raise AtomasError(f"cannot write {error.filename or directory}: {error.strerror or error}") from error


def decode_samples(data: bytes) -> list[Record]:
    """The records of a block: `id`, `smiles`, `inchikey`, `text`."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return [_record(sample) for sample in _samples(tar)]


def _find_tars(directory: Path) -> dict[str, list[Path]]:
    if not directory.is_dir():
        raise AtomasError(f"{directory} is not a folder")
    tars = {"train": sorted(directory.glob("*.tar"))}
    for folder in sorted(
        path for path in directory.iterdir() if path.is_dir() and path.name != QUARANTINE_NAME
    ):
        tars[folder.name] = tars.get(folder.name, []) + sorted(folder.glob("*.tar"))
    tars = {split: paths for split, paths in tars.items() if paths}
    if not tars:
        packed = next(directory.rglob("*.tar.*"), None)
        hint = (
            f": {packed.name} is compressed, which cannot be read from its middle; unpack it"
            if packed
            else ""
        )
        raise AtomasError(f"{directory} holds no .tar file{hint}")
    return tars


def _index_shard(directory: Path, path: Path) -> tuple[Shard, list[dict[str, Any]]]:
    """The shard with its blocks numbered from 0, and its samples that cannot be used."""
    name = path.relative_to(directory).as_posix()
    blocks: list[Block] = []
    rejected: list[dict[str, Any]] = []
    run: list[_Sample] = []
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            position = 0
            for sample in _samples(tar):
                if len(run) == BLOCK_SIZE or (run and sample.start != position):
                    blocks.append(_block(path, run))
                    run = []
                position = sample.stop
                try:
                    _record(sample)
                except UnusableSampleError as error:
                    rejected.append(
                        {"shard": name, "offset": sample.start, "key": sample.key, "reason": str(error)}
                    )
                    position = -1
                else:
                    run.append(sample)
            if run:
                blocks.append(_block(path, run))
    except (OSError, tarfile.TarError) as error:
        raise AtomasError(f"{path} cannot be read as a tar ({error}): restore or remove it") from error
    shard = Shard(
        path=name,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        num_records=sum(block.num_records for block in blocks),
        blocks=BlockTable.of(blocks, PLAIN_SUFFIX, 0),
    )
    return shard, rejected


def _block(path: Path, run: Sequence[_Sample]) -> Block:
    start, stop = run[0].start, run[-1].stop
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(stop - start)
    return Block(
        name="", offset=start, bytes=len(data), num_records=len(run),
        sha256=hashlib.sha256(data).hexdigest(), unpacked_bytes=len(data),
    )  # fmt: skip


def _numbered(shard: Shard, first: int) -> Shard:
    blocks = BlockTable.of(list(shard.blocks), PLAIN_SUFFIX, first)
    return Shard(
        path=shard.path, bytes=shard.bytes, sha256=shard.sha256, num_records=shard.num_records, blocks=blocks
    )


def _samples(tar: tarfile.TarFile) -> Iterator[_Sample]:
    """Consecutive members with the same name up to the first dot of their base name."""
    key, start, stop, files = "", 0, 0, dict[str, bytes]()
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # it would keep the headers of all
        if not member.isfile():
            continue
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        own = posixpath.join(folder, stem)
        if own != key or extension.lower() in files:
            if files:
                yield _Sample(key=key, start=start, stop=stop, files=files)
            key, start, files = own, member.offset, {}
        opened = tar.extractfile(member)
        files[extension.lower()] = opened.read() if opened else b""
        stop = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if files:
        yield _Sample(key=key, start=start, stop=stop, files=files)


def _record(sample: _Sample) -> Record:
    fields = _json_fields(sample.files.get("json"))
    smiles = _first(_text(sample.files, SMILES_EXTENSIONS).split()) or _named(fields, SMILES_COLUMNS)
    text = _text(sample.files, TEXT_EXTENSIONS).strip() or _named(fields, TEXT_COLUMNS)
    for what, value, extensions in (("SMILES", smiles, SMILES_EXTENSIONS), ("text", text, TEXT_EXTENSIONS)):
        if not value:
            wanted = ", ".join(f".{one}" for one in extensions)
            has = ", ".join(f".{one}" for one in sample.files)
            raise UnusableSampleError(f"no {what}: needs one of {wanted} or a .json that has it, has {has}")
    try:
        molecule = parse_molecule(smiles)
    except InvalidMoleculeError as error:
        raise UnusableSampleError(f"not a molecule: {error}") from error
    identifier = _named(fields, ID_COLUMNS) or sample.key
    return {"id": identifier, "smiles": molecule.smiles, "inchikey": molecule.inchikey, "text": text}


def _json_fields(data: bytes | None) -> Mapping[str, Any]:
    if data is None:
        return {}
    try:
        value = json.loads(data)
    except ValueError as error:
        raise UnusableSampleError(f"its .json is damaged: {error}") from error
    if not isinstance(value, dict):
        raise UnusableSampleError("its .json is not an object")
    return {str(name).lower(): field for name, field in value.items()}


def _text(files: Mapping[str, bytes], extensions: Sequence[str]) -> str:
    for extension in extensions:
        if extension in files:
            try:
                return files[extension].decode()
            except UnicodeDecodeError as error:
                raise UnusableSampleError(f"its .{extension} is not UTF-8: {error}") from error
    return ""


def _named(fields: Mapping[str, Any], names: Sequence[str]) -> str:
    return _first([str(fields[name]).strip() for name in names if isinstance(fields.get(name), str | int)])


def _first(items: Sequence[str]) -> str:
    return items[0] if items else ""
