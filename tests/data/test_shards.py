"""Shards: what is written is read, by us and by WebDataset, and damage is noticed."""

import json
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from atomas.data.shard_index import file_sha256, write_index
from atomas.data.shard_writer import ShardWriter
from atomas.data.shards import Corpus
from atomas.errors import AtomasError


def make_records(count: int) -> list[dict[str, str]]:
    # Line and paragraph separators of Unicode must not end a JSON line.
    return [
        {"id": str(i), "smiles": "C" * (i % 7 + 1), "text": f"caf\u00e9 \u2028 \x85 {i}\n"}
        for i in range(count)
    ]


def write_corpus(directory: Path, splits: dict[str, list[dict[str, str]]], **sizes: int) -> Path:
    indexes = {}
    for name, records in splits.items():
        with ShardWriter(directory, name, **sizes) as writer:
            for record in records:
                writer.write(record)
        indexes[name] = writer.index()
    write_index(directory, indexes, counts={}, hazards={}, sources=[], options={})
    return directory


@pytest.fixture
def corpus_dir(tmp_path: Path) -> Path:
    splits = {"train": make_records(50), "test": make_records(3)}
    return write_corpus(tmp_path / "corpus", splits, block_size=8, shard_bytes=4096)


def test_records_come_back_in_order(corpus_dir: Path) -> None:
    split = Corpus.open(corpus_dir).split("train")
    assert list(split) == make_records(50)
    assert split.num_records == 50
    assert [block.num_records for block in split.blocks] == [8] * 6 + [2]
    assert split.read_block(6) == make_records(50)[48:]


def test_block_names_count_up_over_shards(corpus_dir: Path) -> None:
    split = Corpus.open(corpus_dir).split("train")
    assert len(split.shards) > 1
    assert [block.name for block in split.blocks] == [f"{i:06d}.jsonl" for i in range(7)]


def test_webdataset_reads_the_same_blocks(corpus_dir: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    split = Corpus.open(corpus_dir).split("train")
    urls = [str(corpus_dir / shard.path) for shard in split.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{i:06d}" for i in range(7)]
    records = [json.loads(line) for sample in samples for line in sample["jsonl"].splitlines()]
    assert records == make_records(50)


def test_offsets_are_those_of_tarfile(corpus_dir: Path) -> None:
    for shard in Corpus.open(corpus_dir).split("train").shards:
        with tarfile.open(corpus_dir / shard.path) as tar:
            found = [(member.name, member.offset_data, member.size) for member in tar]
        assert found == [(block.name, block.offset, block.bytes) for block in shard.blocks]


def test_bytes_depend_on_records_alone(tmp_path: Path) -> None:
    one = write_corpus(tmp_path / "one", {"train": make_records(20)})
    two = write_corpus(tmp_path / "two", {"train": make_records(20)})
    other = write_corpus(tmp_path / "other", {"train": make_records(20)[::-1]})
    for name in ("train/shard-000000.tar", "index.json"):
        assert file_sha256(one / name) == file_sha256(two / name)
    assert Corpus.open(one).fingerprint != Corpus.open(other).fingerprint


def test_split_survives_pickling_and_threads(corpus_dir: Path) -> None:
    split = pickle.loads(pickle.dumps(Corpus.open(corpus_dir).split("train")))
    with ThreadPoolExecutor(4) as pool:
        blocks = list(pool.map(split.read_block, [0, 1, 2, 3, 4, 5, 6] * 5))
    assert [record for block in blocks[:7] for record in block] == make_records(50)


def test_unknown_split_names_those_there_are(corpus_dir: Path) -> None:
    with pytest.raises(AtomasError, match=r"no split 'validation'; its splits are: train, test"):
        Corpus.open(corpus_dir).split("validation")


def test_corrupt_block_is_named(corpus_dir: Path) -> None:
    corpus = Corpus.open(corpus_dir)
    split = corpus.split("train")
    shard = corpus_dir / split.shards[0].path
    data = bytearray(shard.read_bytes())
    data[split.blocks[1].offset + 3] ^= 1
    shard.write_bytes(data)
    assert split.read_block(0) == make_records(8)
    with pytest.raises(AtomasError, match=rf"block 000001\.jsonl of shard {shard} is corrupt"):
        split.read_block(1)


def test_truncated_and_missing_shards_are_noticed_on_opening(corpus_dir: Path) -> None:
    shard = corpus_dir / "test/shard-000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512])
    with pytest.raises(
        AtomasError, match=rf"shard {shard} has {len(whole) - 512} bytes where the index says"
    ):
        Corpus.open(corpus_dir)
    shard.unlink()
    with pytest.raises(AtomasError, match=rf"shard {shard} cannot be read"):
        Corpus.open(corpus_dir)


def test_shard_lost_after_opening_is_one_line(corpus_dir: Path) -> None:
    split = Corpus.open(corpus_dir).split("test")
    (corpus_dir / split.shards[0].path).unlink()
    with pytest.raises(AtomasError, match=r"cannot read block 000000\.jsonl of shard .*: No such file"):
        split.read_block(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "has format None"),
        ('{"format": "atomas-shards/0"}', r"has format 'atomas-shards/0', this version reads"),
        ('{"format": "atomas-shards/2"}', "is damaged"),
        ('{"format": "atomas-shards/2", "splits": {"train": 3}, "fingerprint": ""}', "is damaged"),
    ],
)
def test_wrong_index(corpus_dir: Path, content: str, message: str) -> None:
    (corpus_dir / "index.json").write_text(content)
    with pytest.raises(AtomasError, match=message) as caught:
        Corpus.open(corpus_dir)
    assert "\n" not in str(caught.value)


def test_edited_index_is_noticed(corpus_dir: Path) -> None:
    path = corpus_dir / "index.json"
    index = json.loads(path.read_text())
    index["splits"]["test"]["shards"].clear()
    path.write_text(json.dumps(index))
    with pytest.raises(AtomasError, match="changed by hand"):
        Corpus.open(corpus_dir)


def test_failed_writer_leaves_no_corpus(tmp_path: Path) -> None:
    def write() -> None:
        with ShardWriter(tmp_path / "corpus", "train", block_size=1) as writer:
            writer.write({"id": "0"})
            writer.write({"id": object()})

    with pytest.raises(TypeError, match="not JSON serializable"):
        write()
    with pytest.raises(AtomasError, match=r"not a built corpus \(it has no index.json\)"):
        Corpus.open(tmp_path / "corpus")
