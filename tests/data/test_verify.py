"""A corpus against its index: a flipped bit or a cut at every class of place is found, named and repaired."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from atomas.cli import main
from atomas.data.blocks import Compression
from atomas.data.shard_index import write_index
from atomas.data.shard_writer import ShardWriter
from atomas.data.shards import Corpus
from atomas.data.verify import Report, verify_corpus
from atomas.errors import AtomasError

BLOCK = 4
RECORDS = [
    {"id": str(number), "smiles": "C" * (number % 20 + 1), "text": f"text {number}"} for number in range(60)
]


def write_corpus(directory: Path, compression: Compression = "none") -> Path:
    with ShardWriter(
        directory, "train", block_size=BLOCK, shard_bytes=5_000, compression=compression
    ) as writer:
        for record in RECORDS:
            writer.write(record)
    write_index(directory, {"train": writer.index()}, counts={}, hazards={}, sources=[], options={})
    return directory


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")


def flip(path: Path, place: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


def check(directory: Path, *, repair: bool = False) -> Report:
    return verify_corpus(directory, repair=repair, workers=1)


def ids(directory: Path) -> list[int]:
    return [int(record["id"]) for record in Corpus.open(directory).split("train")]


def test_an_undamaged_corpus_has_no_fault(corpus: Path) -> None:
    report = check(corpus, repair=True)
    assert (report.records, report.faults, report.lost_records) == (60, (), None)
    assert report.shards >= 3
    assert not (corpus / "quarantine").exists()


# What a place of the second block of the first shard is called, and the samples lost by a flip there.
PLACES: dict[str, tuple[Callable[[int, int], int], str, set[int]]] = {
    "header, name": (lambda offset, _: offset - 512, "tar header of 000001.jsonl", set()),
    "header, size": (lambda offset, _: offset - 512 + 130, "tar header of 000001.jsonl", set()),
    "header, end": (lambda offset, _: offset - 1, "tar header of 000001.jsonl", set()),
    "payload, first byte": (lambda offset, _: offset, "000001.jsonl", {4, 5, 6, 7}),
    "payload, inside": (lambda offset, size: offset + size // 2, "000001.jsonl", {4, 5, 6, 7}),
    "payload, last byte": (lambda offset, size: offset + size - 1, "000001.jsonl", {4, 5, 6, 7}),
    "padding": (lambda offset, size: offset + size, "padding after 000001.jsonl", set()),
    "trailer": (lambda *_: -1, "end of the archive", set()),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bit", [1, 128])
def test_a_flipped_bit_is_found_named_and_repaired(corpus: Path, place: str, bit: int) -> None:
    where, name, lost = PLACES[place]
    split = Corpus.open(corpus).split("train")
    block = split.blocks[1]
    path = corpus / split.shards[0].path
    flip(path, where(block.offset, block.bytes), bit)
    damaged = path.read_bytes()
    report = check(corpus)
    assert [(fault.shard, fault.place) for fault in report.faults] == [("train/shard-000000.tar", name)]
    fault = report.faults[0]
    if lost:
        assert fault.first is not None
        assert fault.last is not None
        assert set(range(fault.first, fault.last + 1)) <= lost
    else:
        assert fault.first is None
    assert path.read_bytes() == damaged
    assert check(corpus, repair=True).lost_records == len(lost)
    assert ids(corpus) == [number for number in range(60) if number not in lost]
    assert check(corpus).faults == ()
    assert (corpus / "quarantine/train/shard-000000.tar").read_bytes() == damaged
    assert Corpus.open(corpus).index["repairs"][0]["lost_records"] == len(lost)


@pytest.mark.parametrize("part", ["index", "tar"])
def test_no_flipped_bit_passes(corpus: Path, part: str) -> None:
    """Every 37th byte of a file, each in a bit of its own."""
    path = corpus / ("index.json" if part == "index" else "train/shard-000001.tar")
    whole = path.read_bytes()
    for place in [*range(0, len(whole), 37), len(whole) - 1]:
        flip(path, place, 1 << place % 8)
        if part == "index":
            with pytest.raises(AtomasError, match=r"index\.json"):
                check(corpus)
            with pytest.raises(AtomasError, match=r"index\.json"):
                Corpus.open(corpus)
        else:
            assert check(corpus).faults
        path.write_bytes(whole)
    assert not check(corpus).faults


@pytest.mark.parametrize(
    "cut", ["in a header", "in a payload", "in a padding", "in the trailer", "to nothing"]
)
def test_a_truncated_shard_is_found_named_and_repaired(corpus: Path, cut: str) -> None:
    split = Corpus.open(corpus).split("train")
    block = split.blocks[1]
    path = corpus / split.shards[0].path
    size = {
        "in a header": block.offset - 200,
        "in a payload": block.offset + 10,
        "in a padding": block.offset + block.bytes + 1,
        "in the trailer": path.stat().st_size - 512,
        "to nothing": 0,
    }[cut]
    with path.open("r+b") as file:
        file.truncate(size)
    with pytest.raises(AtomasError, match=rf"shard-000000.tar has {size} bytes where the index says"):
        Corpus.open(corpus)
    report = check(corpus)
    assert {fault.shard for fault in report.faults} == {"train/shard-000000.tar"}
    assert str(report.faults[0]).startswith(
        f"train/shard-000000.tar: whole file: {size} bytes where the index says"
    )
    blocks = len(split.shards[0].blocks)
    first_lost = {"in a padding": 2, "in the trailer": blocks, "to nothing": 0}.get(cut, 1) * BLOCK
    lost = set(range(first_lost, blocks * BLOCK))
    assert check(corpus, repair=True).lost_records == len(lost)
    assert ids(corpus) == [number for number in range(60) if number not in lost]
    assert not check(corpus).faults


def test_a_missing_shard_is_left_out(corpus: Path) -> None:
    (corpus / "train/shard-000001.tar").unlink()
    fault = check(corpus).faults[0]
    assert (fault.shard, fault.place, fault.reason) == (
        "train/shard-000001.tar",
        "whole file",
        "No such file or directory",
    )
    assert (fault.first, fault.last) == (ids_of_shard(1)[0], ids_of_shard(1)[-1])
    check(corpus, repair=True)
    assert ids(corpus) == [number for number in range(60) if number not in ids_of_shard(1)]


def ids_of_shard(number: int) -> range:
    per_shard = 5 * BLOCK  # 512 + 512 bytes a block, a shard ends past 5,000
    return range(number * per_shard, min(60, (number + 1) * per_shard))


def test_compressed_blocks(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", "zstd")
    block = Corpus.open(corpus).split("train").blocks[1]
    flip(corpus / "train/shard-000000.tar", block.offset + 5)
    (fault,) = check(corpus).faults
    assert (fault.place, fault.first, fault.last) == ("000001.jsonl.zst", 4, 7)
    check(corpus, repair=True)
    assert ids(corpus) == [number for number in range(60) if number not in (4, 5, 6, 7)]


def test_one_bad_line_is_named_as_one_sample(corpus: Path) -> None:
    split = Corpus.open(corpus).split("train")
    block = split.blocks[1]
    path = corpus / split.shards[0].path
    third_line = path.read_bytes().index(b'{"id":"6"')
    assert block.offset < third_line < block.offset + block.bytes
    flip(path, third_line)
    (fault,) = check(corpus).faults
    assert (
        str(fault) == "train/shard-000000.tar: 000001.jsonl (sample 6): its checksum differs from the index"
    )


def test_nothing_left_is_an_error_and_changes_nothing(corpus: Path) -> None:
    for path in (corpus / "train").iterdir():
        path.write_bytes(b"")
    index = (corpus / "index.json").read_bytes()
    with pytest.raises(AtomasError, match="nothing is left of split train"):
        check(corpus, repair=True)
    assert (corpus / "index.json").read_bytes() == index
    assert not (corpus / "quarantine").exists()


def test_two_repairs_keep_both_shards(corpus: Path) -> None:
    for _ in range(2):
        split = Corpus.open(corpus).split("train")
        flip(corpus / split.shards[0].path, split.blocks[0].offset)
        check(corpus, repair=True)
    assert ids(corpus) == list(range(8, 60))
    assert len(list((corpus / "quarantine/train").iterdir())) >= 2
    assert len(Corpus.open(corpus).index["repairs"]) == 2


def test_the_command(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "verify", str(corpus)])
    assert "are as they were written" in capsys.readouterr().out
    block = Corpus.open(corpus).split("train").blocks[1]
    flip(corpus / "train/shard-000000.tar", block.offset)
    with pytest.raises(SystemExit) as caught:
        main(["data", "verify", str(corpus)])
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert (
        printed.out
        == "train/shard-000000.tar: 000001.jsonl (sample 4): its checksum differs from the index\n"
    )
    assert printed.err.count("\n") == 1
    main(["data", "verify", str(corpus), "--repair"])
    assert "repaired, 4 of 60 records are lost" in capsys.readouterr().out
    main(["data", "verify", str(corpus)])


def test_no_corpus_and_an_unwritable_one(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(AtomasError, match="not a built corpus"):
        check(tmp_path)
    block = Corpus.open(corpus).split("train").blocks[1]
    flip(corpus / "train/shard-000000.tar", block.offset)
    (corpus / "quarantine").write_text("a file where a folder should be")
    copy = shutil.copytree(corpus, tmp_path / "copy")
    with pytest.raises(AtomasError, match=r"cannot write .*quarantine"):
        check(copy, repair=True)
    assert (copy / "train/shard-000000.tar").exists()
