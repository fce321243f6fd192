"""Blocks: the members of shards, as an index holds them (in columns) and as they are packed.

A corpus of 100 million pairs has 390,000 blocks: as columns they take 20 MB, which forked workers share;
as Python objects they would take ten times as much in every process.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

Compression = Literal["none", "zstd"]

PLAIN_SUFFIX = "tar"
"""Of blocks that are runs of a tar's own bytes: those of another project's shards (`plain_shards`)."""

_ZSTD_SUFFIX = ".zst"
_ZSTD_LEVEL = 3


@dataclass(frozen=True, kw_only=True)
class Block:
    """One member of a shard: `num_records` records in `bytes` bytes, from byte `offset` of the tar on."""

    name: str
    offset: int
    bytes: int
    num_records: int
    sha256: str
    """Of the bytes as they are stored."""
    unpacked_bytes: int
    """Bytes when decompressed; `bytes` where nothing is compressed."""


class BlockTable(Sequence[Block]):
    """The blocks of a shard or a split, in columns; an item is a `Block`.

    Their names count on from `first`: `000012.jsonl`.
    """

    def __init__(
        self,
        *,
        suffix: str,
        first: int,
        offset: NDArray[np.int64],
        bytes: NDArray[np.int64],
        num_records: NDArray[np.int32],
        unpacked_bytes: NDArray[np.int64],
        sha256: NDArray[np.uint8],
    ) -> None:
        """Columns of n blocks, `sha256` [n, 32]; ValueError where their lengths differ."""
        columns = (bytes, num_records, unpacked_bytes, sha256)
        if any(len(column) != len(offset) for column in columns) or sha256.shape != (len(offset), 32):
            raise ValueError("columns of blocks differ in length")
        self.suffix = suffix
        self.first = first
        self.offset = offset
        self.bytes = bytes
        self.num_records = num_records
        self.unpacked_bytes = unpacked_bytes
        self.sha256 = sha256

    @staticmethod
    def of(blocks: Sequence[Block], suffix: str, first: int) -> "BlockTable":
        """The columns of `blocks`, named from `first` on."""
        return BlockTable(
            suffix=suffix,
            first=first,
            offset=np.array([block.offset for block in blocks], dtype=np.int64),
            bytes=np.array([block.bytes for block in blocks], dtype=np.int64),
            num_records=np.array([block.num_records for block in blocks], dtype=np.int32),
            unpacked_bytes=np.array([block.unpacked_bytes for block in blocks], dtype=np.int64),
            sha256=_digests("".join(block.sha256 for block in blocks)),
        )

    @staticmethod
    def concatenate(tables: Sequence["BlockTable"]) -> "BlockTable":
        """Blocks of consecutive shards of a split."""
        if not tables:
            return BlockTable.of([], "jsonl", 0)
        following = np.cumsum([tables[0].first] + [len(table) for table in tables])
        suffixes = {table.suffix for table in tables}
        if len(suffixes) > 1 or any(
            table.first != first for table, first in zip(tables, following.tolist(), strict=False)
        ):
            raise ValueError("the shards' blocks do not follow each other")
        return BlockTable(
            suffix=tables[0].suffix,
            first=tables[0].first,
            offset=np.concatenate([table.offset for table in tables]),
            bytes=np.concatenate([table.bytes for table in tables]),
            num_records=np.concatenate([table.num_records for table in tables]),
            unpacked_bytes=np.concatenate([table.unpacked_bytes for table in tables]),
            sha256=np.concatenate([table.sha256 for table in tables]),
        )

    def to_json(self) -> dict[str, Any]:
        """As the index stores it; all SHA-256 in one string of hexadecimal digits."""
        return {
            "suffix": self.suffix,
            "first": self.first,
            "offset": self.offset.tolist(),
            "bytes": self.bytes.tolist(),
            "num_records": self.num_records.tolist(),
            "unpacked_bytes": self.unpacked_bytes.tolist(),
            "sha256": self.sha256.tobytes().hex(),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "BlockTable":
        """The inverse of `to_json`; KeyError, TypeError or ValueError where it is damaged."""
        return BlockTable(
            suffix=str(value["suffix"]),
            first=int(value["first"]),
            offset=np.array(value["offset"], dtype=np.int64),
            bytes=np.array(value["bytes"], dtype=np.int64),
            num_records=np.array(value["num_records"], dtype=np.int32),
            unpacked_bytes=np.array(value["unpacked_bytes"], dtype=np.int64),
            sha256=_digests(value["sha256"]),
        )

    def __len__(self) -> int:
        return len(self.offset)

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Block]: ...
    def __getitem__(self, index: int | slice) -> Block | Sequence[Block]:
        """One block, or a list of some."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        return Block(
            name=f"{self.first + index % len(self):06d}.{self.suffix}",
            offset=int(self.offset[index]),
            bytes=int(self.bytes[index]),
            num_records=int(self.num_records[index]),
            sha256=self.sha256[index].tobytes().hex(),
            unpacked_bytes=int(self.unpacked_bytes[index]),
        )

    def __iter__(self) -> Iterator[Block]:
        return (self[number] for number in range(len(self)))


def member_suffix(kind: str, compression: Compression) -> str:
    """What a member's name ends with: `jsonl`, `safetensors`, `jsonl.zst`, ..."""
    return kind + (_ZSTD_SUFFIX if compression == "zstd" else "")


def pack(data: bytes, suffix: str) -> bytes:
    """`data` as a member with this suffix stores it."""
    if not suffix.endswith(_ZSTD_SUFFIX):
        return data
    import pyarrow

    return bytes(pyarrow.Codec("zstd", compression_level=_ZSTD_LEVEL).compress(data, asbytes=True))


def unpack(data: bytes, block: Block) -> bytes:
    """The inverse of `pack`: `unpacked_bytes` bytes, or OSError."""
    if not block.name.endswith(_ZSTD_SUFFIX):
        return data
    import pyarrow

    return bytes(pyarrow.decompress(data, decompressed_size=block.unpacked_bytes, codec="zstd", asbytes=True))


def _digests(digits: str) -> NDArray[np.uint8]:
    return np.frombuffer(bytes.fromhex(digits), dtype=np.uint8).reshape(-1, 32)
