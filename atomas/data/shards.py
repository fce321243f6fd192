"""Shards on disk: plain WebDataset tars of record blocks, and the index beside them.

    DIR/index.json                  written last: a folder without it is not a corpus
    DIR/<split>/shard-000000.tar    members 000000.jsonl, 000001.jsonl, ...: blocks of 256 JSON lines
                                    (000000.jsonl.zst where they are compressed)

The bytes of a shard depend on its records alone (no times, owners or host names in the tar headers).
"""

import hashlib
import json
import os
import platform
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from atomas.config import StorageConfig
from atomas.data.bad_samples import BlockError
from atomas.data.blocks import (
    PLAIN_SUFFIX,
    Block,
    BlockTable,
    Compression,
    member_suffix,
    pack,
    unpack,
)
from atomas.data.storage import Storage, open_storage
from atomas.disk import sync
from atomas.errors import AtomasError
from atomas.version import __version__

FORMAT = "atomas-shards/2"
INDEX_NAME = "index.json"
BLOCK_SIZE = 256
SHARD_BYTES = 64 * 2**20

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file; `path` is relative to the corpus folder."""

    path: str
    bytes: int
    sha256: str
    num_records: int
    blocks: BlockTable

    def to_json(self) -> dict[str, Any]:
        """As the index stores it."""
        return {
            "path": self.path,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "num_records": self.num_records,
            "blocks": self.blocks.to_json(),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Shard":
        """The inverse of `to_json`; KeyError, TypeError or ValueError where it is damaged."""
        return Shard(**{**value, "blocks": BlockTable.from_json(value["blocks"])})


@dataclass(frozen=True, kw_only=True)
class SplitIndex:
    """What the index says of one split."""

    num_records: int
    shards: tuple[Shard, ...]

    def to_json(self) -> dict[str, Any]:
        """As the index stores it."""
        return {"num_records": self.num_records, "shards": [shard.to_json() for shard in self.shards]}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "SplitIndex":
        """The inverse of `to_json`; KeyError, TypeError or ValueError where it is damaged."""
        shards = tuple(Shard.from_json(shard) for shard in value["shards"])
        return SplitIndex(num_records=value["num_records"], shards=shards)


class ShardWriter:
    """Write the records of one split, in order, as `directory/<split>/shard-*.tar`.

    A context manager; `index()` is complete after it has closed. A shard ends with the block that
    takes it past `shard_bytes`. `kind` says what a block holds, and ends its name; shards and blocks are
    numbered from `first_shard` and `first_block` on, for the parts of a split that are written apart.
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        *,
        kind: str = "jsonl",
        compression: Compression = "none",
        block_size: int = BLOCK_SIZE,
        shard_bytes: int = SHARD_BYTES,
        first_shard: int = 0,
        first_block: int = 0,
    ) -> None:
        self._directory = Path(directory)
        self._split = split
        self._suffix = member_suffix(kind, compression)
        self._block_size = block_size
        self._shard_bytes = shard_bytes
        self._first_shard = first_shard
        self._lines: list[bytes] = []
        self._blocks: list[Block] = []
        self._next_block = first_block
        self._shards: list[Shard] = []
        self._tar: Any = None
        """webdataset.TarWriter of the shard that is open"""

    def __enter__(self) -> "ShardWriter":
        (self._directory / self._split).mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._end_block()
            self._end_shard()
        elif self._tar is not None:
            self._tar.stream.close()

    def write(self, record: Record) -> None:
        """Append one record."""
        self.write_encoded(encode_record(record))

    def write_encoded(self, line: bytes) -> None:
        """Append one record that `encode_record` has encoded."""
        self._lines.append(line)
        if len(self._lines) == self._block_size:
            self._end_block()

    def write_block(self, data: bytes, num_records: int) -> None:
        """Append a whole block of `num_records` records, encoded by the caller."""
        if self._tar is None:
            self._tar = _open_tar(self._path)
        key = f"{self._next_block:06d}"
        offset = self._tar.tarstream.offset + tarfile.BLOCKSIZE
        stored = pack(data, self._suffix)
        self._tar.write({"__key__": key, self._suffix: stored})
        self._blocks.append(
            Block(
                name=f"{key}.{self._suffix}",
                offset=offset,
                bytes=len(stored),
                num_records=num_records,
                sha256=hashlib.sha256(stored).hexdigest(),
                unpacked_bytes=len(data),
            )
        )
        self._next_block += 1
        if self._tar.tarstream.offset >= self._shard_bytes:
            self._end_shard()

    def index(self) -> SplitIndex:
        """The split's part of the index."""
        return SplitIndex(
            num_records=sum(shard.num_records for shard in self._shards), shards=tuple(self._shards)
        )

    @property
    def _path(self) -> Path:
        return self._directory / self._split / f"shard-{self._first_shard + len(self._shards):06d}.tar"

    def _end_block(self) -> None:
        if self._lines:
            data, count = b"".join(self._lines), len(self._lines)
            self._lines = []
            self.write_block(data, count)

    def _end_shard(self) -> None:
        if self._tar is None:
            return
        path = self._path
        self._tar.close()
        self._tar.stream.close()
        self._tar = None
        self._shards.append(
            Shard(
                path=f"{self._split}/{path.name}",
                bytes=path.stat().st_size,
                sha256=file_sha256(path),
                num_records=sum(block.num_records for block in self._blocks),
                blocks=BlockTable.of(self._blocks, self._suffix, self._next_block - len(self._blocks)),
            )
        )
        self._blocks = []


def _open_tar(path: Path) -> Any:
    import webdataset  # imports torch: only for whoever writes

    # Fixed owner and times: the same records give the same bytes, wherever and whenever they are written.
    return webdataset.TarWriter(path.open("wb"), user="", group="", mode=0o644, mtime=0, encoder=False)


def encode_record(record: Mapping[str, Any]) -> bytes:
    """One JSON line: UTF-8, no spaces, keys in the order given."""
    return _ENCODER.encode(record).encode() + b"\n"


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def write_index(
    directory: Path,
    splits: Mapping[str, SplitIndex],
    *,
    counts: Mapping[str, Any],
    hazards: Mapping[str, Any],
    sources: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    alignment: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Write `directory/index.json` atomically, as the last file of a corpus; returns its content.

    `splits` maps each split's name to what its writer's `index()` returned; the other arguments, of any
    name, are stored as given (JSON values).
    """
    index: dict[str, Any] = {
        "format": FORMAT,
        "splits": {name: split.to_json() for name, split in splits.items()},
        "fingerprint": corpus_fingerprint(splits),
        "counts": dict(counts),
        "hazards": dict(hazards),
        "alignment": dict(alignment or {}),
        "sources": [dict(source) for source in sources],
        "options": dict(options),
        "versions": {
            "atomas": __version__,
            "python": platform.python_version(),
            "rdkit": version("rdkit"),
            "pyarrow": version("pyarrow"),  # whose zstd compresses
        },
        **more,
    }
    rewrite_index(directory, index)
    return index


def rewrite_index(directory: Path, index: Mapping[str, Any]) -> None:
    """Put `index` in place of the one that is there, atomically.

    Its last line is the SHA-256 of all lines before it, so that a flipped bit anywhere is noticed.
    """
    path = Path(directory) / INDEX_NAME
    partial = path.with_name(INDEX_NAME + ".partial")
    # A line for each of its parts: the columns of blocks are long.
    parts = [f"{json.dumps(name)}: {_compact_json(value)},\n" for name, value in index.items()]
    content = ("{\n" + "".join(parts)).encode()
    with partial.open("wb") as file:
        file.write(content)
        file.write(_checksum_line(content))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A built corpus, opened for reading."""

    storage: Storage
    index: dict[str, Any]
    splits: dict[str, "ShardedSplit"] = field(repr=False)

    @staticmethod
    def open(location: Path | str | Storage, config: StorageConfig | None = None) -> "Corpus":
        """Read the index, and check that every shard of a folder is there with its full size.

        `location` is a folder, an address or what either became; `config` says how shards are fetched from one.
        Raises AtomasError if there is no corpus, one of another format, or one that lacks (part of) a shard.
        """
        storage = open_storage(location, config) if isinstance(location, Path | str) else location
        index = read_index(storage)
        try:
            splits = {
                name: ShardedSplit(storage=storage, name=name, shards=SplitIndex.from_json(split).shards)
                for name, split in index["splits"].items()
            }
            fingerprint = index["fingerprint"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AtomasError(
                f"{storage.where(INDEX_NAME)} is damaged ({error!r} in the index): build the corpus again"
            ) from error
        if fingerprint != corpus_fingerprint(splits):
            raise AtomasError(
                f"{storage.where(INDEX_NAME)} was changed by hand: its fingerprint does not fit its shards; "
                "build the corpus again"
            )
        for split in splits.values():
            for shard in split.shards:
                storage.check(shard)
        return Corpus(storage=storage, index=index, splits=splits)

    @property
    def directory(self) -> Path:
        """The folder of a corpus on this machine; AtomasError for one that lies elsewhere."""
        if self.storage.folder is None:
            raise AtomasError(f"{self.storage} is not a folder of this machine: copy it here first")
        return self.storage.folder

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the shards' SHA-256 in order: equal means equal records in equal order."""
        return str(self.index["fingerprint"])

    def split(self, name: str) -> "ShardedSplit":
        """The split called `name`; AtomasError names those that exist if it does not."""
        if name not in self.splits:
            raise AtomasError(
                f"{self.storage} has no split {name!r}; its splits are: {', '.join(self.splits) or 'none'}"
            )
        return self.splits[name]

    def parts(self, name: str) -> "list[ShardedSplit]":
        """The split called `name`, alone: what `Corpora` has several of."""
        return [self.split(name)]


@dataclass(frozen=True, kw_only=True)
class ShardedSplit:
    """The records of one split, read block by block.

    Holds no open file, so that it may be shared by threads, forked and pickled.
    """

    storage: Storage
    name: str
    shards: tuple[Shard, ...] = field(repr=False)
    blocks: BlockTable = field(init=False, repr=False)
    _block_ends: "np.ndarray[Any, np.dtype[np.int64]]" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", BlockTable.concatenate([shard.blocks for shard in self.shards]))
        object.__setattr__(self, "_block_ends", np.cumsum([len(shard.blocks) for shard in self.shards]))

    @property
    def num_records(self) -> int:
        """Records in the split."""
        return sum(shard.num_records for shard in self.shards)

    def shard_of(self, index: int) -> Shard:
        """The shard that holds block `index`."""
        return self.shards[int(np.searchsorted(self._block_ends, index, side="right"))]

    def read_block(self, index: int) -> list[Record]:
        """The records of block `index`; see `read_bytes`."""
        if self.blocks.suffix == PLAIN_SUFFIX:
            from atomas.data.plain_shards import decode_samples  # imports this module, and RDKit

            return decode_samples(self.read_bytes(index))
        return [json.loads(line) for line in self.read_bytes(index).splitlines()]

    def read_bytes(self, index: int) -> bytes:
        """What block `index` holds, decompressed; its checksum is verified.

        Raises BlockError naming shard and block when it cannot be read or does not match the index.
        """
        block, shard = self.blocks[index], self.shard_of(index)
        data = self._fetch(shard, block)
        if not _is_intact(data, block) and self.storage.discard(shard):
            data = self._fetch(shard, block)
        if not _is_intact(data, block):
            place = self.storage.where(shard.path)
            raise BlockError(
                f"block {block.name} of shard {place} is corrupt (its checksum differs from the index): restore the "
                "file or build the corpus again",
                shard=place, block=block.name, offset=block.offset, reason="its checksum differs from the index",
            )  # fmt: skip
        return unpack(data, block)

    def _fetch(self, shard: Shard, block: Block) -> bytes:
        """The bytes of a block as they are stored, not checked."""
        try:
            return self.storage.read(shard, block.offset, block.bytes)
        except OSError as error:
            place, reason = self.storage.where(shard.path), error.strerror or str(error)
            raise BlockError(
                f"cannot read block {block.name} of shard {place}: {reason}; restore the file or build "
                "the corpus again",
                shard=place, block=block.name, offset=block.offset, reason=reason,
            ) from error  # fmt: skip

    def __iter__(self) -> Iterator[Record]:
        for index in range(len(self.blocks)):
            yield from self.read_block(index)


def _is_intact(data: bytes, block: Block) -> bool:
    return hashlib.sha256(data).hexdigest() == block.sha256


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def corpus_fingerprint(splits: Mapping[str, "SplitIndex | ShardedSplit"]) -> str:
    """SHA-256 over the shards' SHA-256 in order."""
    digest = hashlib.sha256()
    for split in splits.values():
        for shard in split.shards:
            digest.update(shard.sha256.encode())
    return digest.hexdigest()


def read_index(storage: Storage) -> dict[str, Any]:
    """The index of a corpus, as it was written; AtomasError where there is none or it is damaged."""
    name = storage.where(INDEX_NAME)
    try:
        content = storage.read_whole(INDEX_NAME)
        index = json.loads(content)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AtomasError(
            f"{storage} is not a built corpus (it has no {INDEX_NAME}): "
            f"make one with `atomas data build FILE --out {storage}`"
        ) from error
    except OSError as error:
        raise AtomasError(f"cannot read {name}: {error.strerror or error}") from error
    except ValueError as error:
        raise AtomasError(f"{name} is damaged ({error}): build the corpus again") from error
    found = index.get("format") if isinstance(index, dict) else None
    if found != FORMAT:
        raise AtomasError(
            f"{name} has format {found!r}, this version reads {FORMAT!r}: build the corpus again"
        )
    lines = content[: content.rfind(b'"checksum": ')]
    if index.pop("checksum", None) is None or content != lines + _checksum_line(lines):
        raise AtomasError(
            f"{name} is damaged or was changed by hand (its checksum does not fit): "
            "restore it or build the corpus again"
        )
    return dict(index)


def _checksum_line(content: bytes) -> bytes:
    return f'"checksum": "{hashlib.sha256(content).hexdigest()}"\n}}\n'.encode()


def _compact_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
