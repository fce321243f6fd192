"""Shards on disk: plain WebDataset tars of record blocks, and the index beside them.

    DIR/index.json                  written last: a folder without it is not a corpus
    DIR/<split>/shard-000000.tar    members 000000.jsonl, 000001.jsonl, ...: blocks of 256 JSON lines
                                    (000000.jsonl.zst where they are compressed)

The bytes of a shard depend on its records alone (no times, owners or host names in the tar headers).
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from atomas.config import StorageConfig
from atomas.data.bad_samples import BlockError
from atomas.data.blocks import PLAIN_SUFFIX, Block, BlockTable, unpack
from atomas.data.shard_index import INDEX_NAME, Shard, SplitIndex, corpus_fingerprint, read_index
from atomas.data.storage import Storage, open_storage
from atomas.errors import AtomasError

Record = dict[str, Any]


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
