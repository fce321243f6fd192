"""Records into the shards of a split."""

import hashlib
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from atomas.data.blocks import Block, BlockTable, Compression, member_suffix, pack
from atomas.data.shard_index import Shard, SplitIndex, file_sha256

BLOCK_SIZE = 256
SHARD_BYTES = 64 * 2**20


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

    def write(self, record: Mapping[str, Any]) -> None:
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
