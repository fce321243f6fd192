"""`atomas data verify`: every byte of a corpus against its index; what is damaged, and what can be saved.

A damaged shard is moved to DIR/quarantine as it is; those of its blocks whose checksum fits are written again under
its name, and the index counts what is left. A corpus so repaired is a corpus of other records: it has another
fingerprint, and its tokens (`atomas data tokenize`) go into quarantine with it.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from atomas.data.blocks import PLAIN_SUFFIX, Block, unpack
from atomas.data.parallel import available_cores, ordered_map
from atomas.data.progress import Progress
from atomas.data.shard_index import (
    INDEX_NAME,
    Shard,
    SplitIndex,
    corpus_fingerprint,
    read_index,
    rewrite_index,
)
from atomas.data.shard_writer import ShardWriter
from atomas.data.storage import open_storage
from atomas.disk import sync
from atomas.errors import AtomasError

QUARANTINE_NAME = "quarantine"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that does not fit the index. `first`, `last`: numbers of the samples of the split that are lost."""

    shard: str
    place: str
    reason: str
    first: int | None = None
    last: int | None = None

    def __str__(self) -> str:
        samples = ""
        if self.first is not None:
            samples = (
                f" (sample {self.first}" if self.first == self.last else f" (samples {self.first}-{self.last}"
            )
            samples += ")"
        return f"{self.shard}: {self.place}{samples}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `verify_corpus` found: shards and records read, faults, and (after a repair) the records that are lost."""

    shards: int
    records: int
    faults: tuple[Fault, ...]
    lost_records: int | None = None


def verify_corpus(directory: Path, *, repair: bool = False, workers: int | None = None) -> Report:
    """Read every byte of a corpus, and of its tokens, and compare with the index.

    With `repair`, damaged shards go to quarantine, their good blocks are written again, and the index counts what
    is left. Raises AtomasError for a folder that is no corpus or whose index is damaged, and where nothing is left.
    """
    directory = Path(directory)
    index = read_index(open_storage(directory))
    try:
        splits = {name: SplitIndex.from_json(split) for name, split in index["splits"].items()}
    except (KeyError, TypeError, ValueError) as error:
        raise AtomasError(
            f"{directory / INDEX_NAME} is damaged ({error!r}): build the corpus again"
        ) from error
    shards = [(name, shard) for name, split in splits.items() for shard in split.shards]
    found = _check_shards(directory, shards, workers)
    faults = [fault for one in found for fault in one.faults]
    tokens_faults = {}
    for fingerprint, folder in index.get("tokens", {}).items():
        tokens_faults[fingerprint] = _check_tokens(directory, folder, workers)
        faults += tokens_faults[fingerprint]
    report = Report(
        shards=len(shards), records=sum(shard.num_records for _, shard in shards), faults=tuple(faults)
    )
    if not repair or not faults:
        return report
    try:
        lost = _repair(directory, index, splits, found, tokens_faults)
    except OSError as error:
        raise AtomasError(
            f"cannot write {error.filename or directory}: {error.strerror or error}; make room and permissions right, "
            "then run it again: nothing is removed before its replacement is complete"
        ) from error
    return replace(report, lost_records=lost)


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """A shard, its faults, and the numbers of its blocks that are good."""

    split: str
    shard: Shard
    faults: tuple[Fault, ...]
    good: tuple[int, ...]


def _check_shards(
    directory: Path, shards: Sequence[tuple[str, Shard]], workers: int | None
) -> list[_Checked]:
    firsts: dict[str, int] = {}
    arguments = []
    for split, shard in shards:
        arguments.append((directory, split, shard, firsts.get(split, 0)))
        firsts[split] = firsts.get(split, 0) + shard.num_records
    found = []
    with Progress(
        f"verifying {directory.name}", sum(shard.bytes for _, shard in shards), unit="B"
    ) as progress:
        for one in ordered_map(
            _check_shard, arguments, workers=min(workers or available_cores(), len(shards) or 1)
        ):
            found.append(one)
            progress.update(one.shard.bytes)
    return found


def _check_shard(directory: Path, split: str, shard: Shard, first_record: int) -> _Checked:
    """Walk through a shard as tar would: header, content and padding of every block, then the end.

    Of another project's shard, blocks are parts that hold samples of use, headers included; the rest is the checksum's.
    """
    faults: list[Fault] = []
    good: list[int] = []

    def add(place: str, reason: str, first: int | None = None, last: int | None = None) -> None:
        faults.append(Fault(shard=shard.path, place=place, reason=reason, first=first, last=last))

    last_record = first_record + shard.num_records - 1
    path = directory / shard.path
    is_plain = shard.blocks.suffix == PLAIN_SUFFIX
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != shard.bytes:
                add("whole file", f"{size} bytes where the index says {shard.bytes}")
            record = first_record
            for number, block in enumerate(shard.blocks):
                last = record + block.num_records - 1
                if not is_plain:
                    _check_frame(file, block, add)
                data = _check_block(file, block, record, add)
                if data is not None:
                    good.append(number)
                record = last + 1
            end = 0
            if len(shard.blocks):
                end = _padded(shard.blocks[len(shard.blocks) - 1])
            file.seek(end)
            rest = file.read()
            if not is_plain and (any(rest) or len(rest) < 2 * tarfile.BLOCKSIZE):
                add("end of the archive", "not two blocks of zeros")
            if record - first_record != shard.num_records:
                add("index", f"its blocks hold {record - first_record} records, not {shard.num_records}")
            if not faults:
                file.seek(0)
                if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                    add("whole file", "its checksum differs from the index")
    except OSError as error:
        add("whole file", error.strerror or str(error), first_record, last_record)
        good = []
    return _Checked(split=split, shard=shard, faults=tuple(faults), good=tuple(good))


def _padded(block: Block) -> int:
    return block.offset + -(-block.bytes // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _check_frame(file: BinaryIO, block: Block, add: Callable[..., None]) -> None:
    """Add the faults of what stands before and behind a block."""
    file.seek(block.offset - tarfile.BLOCKSIZE)
    header = file.read(tarfile.BLOCKSIZE)
    file.seek(block.offset + block.bytes)
    padding = file.read(_padded(block) - block.offset - block.bytes)
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        if (member.name, member.size) != (block.name, block.bytes):
            add(f"tar header of {block.name}", f"it says {member.name!r} of {member.size} bytes")
    except tarfile.TarError as error:
        add(f"tar header of {block.name}", str(error))
    if any(padding):
        add(f"padding after {block.name}", "not zeros")


def _check_block(file: BinaryIO, block: Block, first: int, add: Callable[..., None]) -> bytes | None:
    """Add the faults of one block; its content if that is good."""
    file.seek(block.offset)
    data = file.read(block.bytes)
    last = first + block.num_records - 1
    if len(data) < block.bytes:
        add(block.name, f"the file ends {block.bytes - len(data)} bytes before the block does", first, last)
        return None
    if hashlib.sha256(data).hexdigest() != block.sha256:
        bad = _bad_samples(data, block) if block.name.endswith(".jsonl") else []
        if len(bad) == 1:
            first = last = first + bad[0]
        add(block.name, "its checksum differs from the index", first, last)
        return None
    if ".jsonl" in block.name:
        lines = unpack(data, block).count(b"\n")
        if lines != block.num_records:
            add(block.name, f"{lines} records where the index says {block.num_records}", first, last)
            return None
    return data


def _bad_samples(data: bytes, block: Block) -> list[int]:
    """Numbers of the lines that are no JSON, where the lines are still as many as the records."""
    lines = data.split(b"\n")[:-1]
    if len(lines) != block.num_records:
        return []
    bad = []
    for number, line in enumerate(lines):
        try:
            json.loads(line)
        except ValueError:
            bad.append(number)
    return bad


def _check_tokens(directory: Path, folder: str, workers: int | None) -> list[Fault]:
    try:
        faults = verify_corpus(directory / folder, workers=workers).faults
    except AtomasError as error:
        return [Fault(shard=folder, place="tokens", reason=str(error))]
    return [
        Fault(shard=f"{folder}/{fault.shard}", place=fault.place, reason=fault.reason) for fault in faults
    ]


def _repair(
    directory: Path,
    index: dict[str, Any],
    splits: dict[str, SplitIndex],
    found: Sequence[_Checked],
    tokens_faults: dict[str, list[Fault]],
) -> int:
    """Quarantine, rewrite, and put the new index in place; the number of records lost.

    The new shards have names of their own until the index that names them is in place: a kill at any moment leaves
    the damaged corpus or the repaired one.
    """
    quarantine = directory / QUARANTINE_NAME
    repaired: dict[str, list[Shard]] = {name: [] for name in splits}
    next_block = dict.fromkeys(splits, 0)
    for one in found:
        shards = repaired[one.split]
        first = next_block[one.split]
        if one.faults or one.shard.blocks.first != first:
            shard = _write_again(directory, one, len(shards), first)
        else:
            shard = one.shard
        if shard is not None:
            shards.append(shard)
            next_block[one.split] = first + len(shard.blocks)
    for name, shards in repaired.items():
        if not shards:
            raise AtomasError(f"{directory}: nothing is left of split {name}: build the corpus again")
    new = {
        name: SplitIndex(num_records=sum(shard.num_records for shard in shards), shards=tuple(shards))
        for name, shards in repaired.items()
    }
    lost = sum(split.num_records for split in splits.values()) - sum(
        split.num_records for split in new.values()
    )
    records_changed = any(one.faults for one in found)
    tokens: dict[str, str] = index.get("tokens", {})
    kept_tokens = {} if records_changed else {key: f for key, f in tokens.items() if not tokens_faults[key]}
    counts = dict(index["counts"])
    if "splits" in counts:
        counts["splits"] = {
            name: {**of_split, "records": new[name].num_records}
            for name, of_split in counts["splits"].items()
        }
    faults = [asdict(fault) for one in found for fault in one.faults]
    rewrite_index(
        directory,
        {
            **index,
            "splits": {name: split.to_json() for name, split in new.items()},
            "fingerprint": corpus_fingerprint(new),
            "counts": counts,
            "tokens": kept_tokens,
            "repairs": [*index.get("repairs", []), {"faults": faults, "lost_records": lost}],
        },
    )
    gone = [tokens[key] for key in tokens if key not in kept_tokens]
    gone += [one.shard.path for one in found if one.shard not in repaired[one.split]]
    for path in gone:
        if (directory / path).exists():
            target = _free_name(quarantine / path)
            target.parent.mkdir(parents=True, exist_ok=True)
            (directory / path).rename(target)
    return lost


def _write_again(directory: Path, one: _Checked, number: int, first_block: int) -> Shard | None:
    """The good blocks of a shard in a new one, with a name that no shard has; None if there are none."""
    if not one.good:
        return None
    (directory / one.split).mkdir(exist_ok=True)  # shards of another project may lie elsewhere
    taken = {path.name for path in (directory / one.split).iterdir()}
    shard_number = 900_000 + number
    while f"shard-{shard_number:06d}.tar" in taken:
        shard_number += 1_000
    kind, _, compression = one.shard.blocks.suffix.partition(".")
    writer = ShardWriter(
        directory,
        one.split,
        kind=kind,
        compression="zstd" if compression else "none",
        shard_bytes=2**62,
        first_shard=shard_number,
        first_block=first_block,
    )
    with writer, (directory / one.shard.path).open("rb") as file:
        for place in one.good:
            block = one.shard.blocks[place]
            file.seek(block.offset)
            writer.write_block(unpack(file.read(block.bytes), block), block.num_records)
    shard = writer.index().shards[0]
    sync(directory / shard.path)
    return shard


def _free_name(path: Path) -> Path:
    """`path`, or with a number where an earlier repair has taken it."""
    number = 0
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free
