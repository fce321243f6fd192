"""Columns of blocks: what goes in comes out, and damage is noticed."""

import json
import pickle
from pathlib import Path

import pytest

from atomas.cli import main
from atomas.data.blocks import Block, BlockTable, pack, unpack
from atomas.data.shard_index import SplitIndex, write_index
from atomas.data.shard_writer import ShardWriter
from atomas.data.shards import Corpus


def blocks(first: int, count: int) -> list[Block]:
    return [
        Block(
            name=f"{number:06d}.jsonl",
            offset=512 + 1024 * number,
            bytes=300 + number,
            num_records=number + 1,
            sha256=f"{number:064x}",
            unpacked_bytes=300 + number,
        )
        for number in range(first, first + count)
    ]


def test_a_table_holds_its_blocks() -> None:
    table = BlockTable.of(blocks(7, 5), "jsonl", 7)
    assert list(table) == blocks(7, 5)
    assert table[-1] == blocks(11, 1)[0]
    assert table[1:3] == blocks(8, 2)
    with pytest.raises(IndexError):
        table[5]
    assert list(BlockTable.from_json(json.loads(json.dumps(table.to_json())))) == blocks(7, 5)
    assert list(pickle.loads(pickle.dumps(table))) == blocks(7, 5)


def test_tables_of_consecutive_shards_join() -> None:
    parts = [BlockTable.of(blocks(0, 3), "jsonl", 0), BlockTable.of(blocks(3, 2), "jsonl", 3)]
    assert list(BlockTable.concatenate(parts)) == blocks(0, 5)
    with pytest.raises(ValueError, match="do not follow"):
        BlockTable.concatenate(parts[::-1])


def test_damaged_columns_are_refused() -> None:
    value = BlockTable.of(blocks(0, 3), "jsonl", 0).to_json()
    for name, wrong in (("bytes", [1, 2]), ("sha256", value["sha256"][:-2]), ("offset", ["x", 1, 2])):
        with pytest.raises(ValueError, match=r".+"):
            BlockTable.from_json({**value, name: wrong})


def test_compressed_blocks_hold_the_same_records(tmp_path: Path) -> None:
    records = [{"text": f"the compound number {number} is an alcohol"} for number in range(100)]
    for compression in ("none", "zstd"):
        with ShardWriter(tmp_path / compression, "train", block_size=40, compression=compression) as writer:
            for record in records:
                writer.write(record)
        write_index(tmp_path / compression, {"train": writer.index()},
                    counts={}, hazards={}, sources=[], options={})  # fmt: skip
    plain, packed = (Corpus.open(tmp_path / name).split("train") for name in ("none", "zstd"))
    assert list(plain) == list(packed) == records
    assert [block.name for block in packed.blocks] == [f"{number:06d}.jsonl.zst" for number in range(3)]
    assert packed.blocks.bytes.sum() < plain.blocks.bytes.sum() / 3
    assert packed.blocks.unpacked_bytes.tolist() == plain.blocks.bytes.tolist()


def test_compression_is_repeatable() -> None:
    data = json.dumps(list(range(1000))).encode()
    stored = pack(data, "jsonl.zst")
    assert stored == pack(data, "jsonl.zst")
    block = Block(name="0.jsonl.zst", offset=0, bytes=len(stored), num_records=1, sha256="",
                  unpacked_bytes=len(data))  # fmt: skip
    assert unpack(stored, block) == data


def test_parts_written_apart_are_the_split_written_at_once(tmp_path: Path) -> None:
    records = [{"number": number} for number in range(20)]
    with ShardWriter(tmp_path / "once", "train", block_size=5, shard_bytes=3000) as writer:
        for record in records:
            writer.write(record)
    whole = writer.index()
    assert len(whole.shards) == 2
    parts = []
    for shard in whole.shards:
        start = 5 * shard.blocks.first
        with ShardWriter(
            tmp_path / "apart", "train", block_size=5, shard_bytes=3000,
            first_shard=len(parts), first_block=shard.blocks.first,
        ) as writer:  # fmt: skip
            for record in records[start : start + shard.num_records]:
                writer.write(record)
        parts += writer.index().shards
    assert SplitIndex(num_records=20, shards=tuple(parts)).to_json() == whole.to_json()


def test_a_compressed_build_holds_the_same_records(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text(
        "SMILES\tdescription\n" + "".join(f"{'C' * n}O\tan alcohol of {n}\n" for n in range(1, 40))
    )
    for compression in ("none", "zstd"):
        main(["data", "build", str(pairs), "--out", str(tmp_path / compression), "--compression", compression,
              "--workers", "1"])  # fmt: skip
    plain, packed = (Corpus.open(tmp_path / name).split("train") for name in ("none", "zstd"))
    assert list(plain) == list(packed)
    assert packed.blocks[0].name == "000000.jsonl.zst"
    assert packed.blocks[0].bytes < plain.blocks[0].bytes / 3
