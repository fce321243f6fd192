"""Shards of other projects: one sample per key, indexed where they lie, trained on like any others."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset

from atomas.cli import main
from atomas.config import Config, DataConfig, RunConfig
from atomas.data import plain_shards
from atomas.data.bad_samples import BlockError
from atomas.data.corpora import Corpora
from atomas.data.molecules import parse_molecule
from atomas.data.plain_shards import index_shards
from atomas.data.shards import Corpus
from atomas.data.stream import PairStream
from atomas.data.tokenizer import AtomasTokenizer
from atomas.data.verify import verify_corpus
from atomas.errors import AtomasError


def sample(number: int) -> dict[str, object]:
    """Each of the forms in turn."""
    smiles, text = "C" * (number % 30 + 1) + "O", f"alcohol number {number}"
    forms: list[dict[str, object]] = [
        {"smi": f"{smiles} name-{number}\n".encode(), "txt": f"{text}\n".encode()},
        {"json": json.dumps({"SMILES": smiles, "Description": text, "CID": number}).encode()},
        {"smiles": smiles.encode(), "json": json.dumps({"smiles": "wrong", "caption": text}).encode()},
        {"smi": smiles.encode(), "caption": text.encode(), "png": b"\x00" * 700},
    ]
    return {"__key__": f"part/{number:06d}", **forms[number % len(forms)]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(plain_shards, "BLOCK_SIZE", 16)
    directory = tmp_path / "plain"
    (directory / "validation").mkdir(parents=True)
    for name, start, stop in (("a", 0, 50), ("b", 50, 100), ("validation/c", 100, 110)):
        with webdataset.TarWriter(str(directory / f"{name}.tar"), encoder=False) as writer:
            for number in range(start, stop):
                writer.write(sample(number))
    return directory


def test_samples_of_other_projects_are_read(folder: Path) -> None:
    index = index_shards(folder, workers=1)
    assert index["counts"] == {"rows": 110, "rejected": 0}
    corpus = Corpus.open(folder)
    assert {name: split.num_records for name, split in corpus.splits.items()} == {
        "train": 100,
        "validation": 10,
    }
    train = list(corpus.split("train"))
    assert [record["text"] for record in train] == [f"alcohol number {number}" for number in range(100)]
    assert [record["smiles"] for record in train] == ["C" * (number % 30 + 1) + "O" for number in range(100)]
    assert all(record["inchikey"] == parse_molecule(record["smiles"]).inchikey for record in train)
    assert [train[number]["id"] for number in (0, 1, 2)] == ["part/000000", "1", "part/000002"]
    assert [block.num_records for block in corpus.split("train").blocks] == [16, 16, 16, 2] * 2


def test_what_others_have_written_is_verified_and_repaired(folder: Path) -> None:
    with webdataset.TarWriter(str(folder / "b.tar"), encoder=False) as writer:
        writer.write({"__key__": "bad", "smi": b"C1CC", "txt": b"a ring that is not closed"})
        for number in range(50, 100):
            writer.write(sample(number))
    index_shards(folder, workers=1)
    assert verify_corpus(folder, workers=1).faults == ()
    second = Corpus.open(folder).split("train").blocks[1]
    content = bytearray((folder / "a.tar").read_bytes())
    content[second.offset + 5] ^= 1
    (folder / "a.tar").write_bytes(content)
    content = bytearray((folder / "b.tar").read_bytes())
    content[0] ^= 1  # of the sample that is in no block
    (folder / "b.tar").write_bytes(content)
    report = verify_corpus(folder, repair=True, workers=1)
    assert [(fault.shard, fault.first, fault.last) for fault in report.faults] == [
        ("a.tar", 16, 31),
        ("b.tar", None, None),
    ]
    assert report.lost_records == 16
    assert verify_corpus(folder, workers=1).faults == ()
    texts = [record["text"] for record in Corpus.open(folder).split("train")]
    assert texts == [f"alcohol number {number}" for number in range(100) if not 16 <= number < 32]
    assert sorted(path.name for path in (folder / "quarantine").iterdir()) == ["a.tar", "b.tar"]


def test_samples_that_cannot_be_used_are_in_no_block(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad: dict[int, dict[str, object]] = {
        7: {"smi": b"C1CC", "txt": b"a ring that is not closed"},
        20: {"smi": b"CCO"},
        21: {"txt": b"no molecule"},
        49: {"json": b"{"},
    }
    with webdataset.TarWriter(str(folder / "a.tar"), encoder=False) as writer:
        for number in range(50):
            writer.write({"__key__": f"{number:06d}", **bad[number]} if number in bad else sample(number))
    main(["data", "index", str(folder), "--workers", "2"])
    assert "4 samples cannot be used" in capsys.readouterr().out
    texts = [record["text"] for record in Corpus.open(folder).split("train")]
    assert texts == [f"alcohol number {number}" for number in range(100) if number not in bad]
    lines = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [f"{number:06d}" for number in bad]
    for line, reason in zip(lines, ("not a molecule", "no text", "no SMILES", "damaged"), strict=True):
        assert line["shard"] == "a.tar"
        assert reason in line["reason"]


def test_they_are_trained_on(folder: Path, tmp_path: Path) -> None:
    index_shards(folder, workers=1)
    corpus = Corpus.open(folder)
    tokenizer = AtomasTokenizer.train([record["text"] for record in corpus.split("train")], 400)
    config = Config(run=RunConfig(output_dir=str(tmp_path)), data=DataConfig(batch_size=10, window_blocks=2))
    stream = PairStream.open(config, Corpora.of(corpus), tokenizer)
    assert sorted(s for number in range(10) for s in stream[number].sample_id.tolist()) == list(range(100))


def test_a_changed_byte_is_noticed(folder: Path) -> None:
    index_shards(folder, workers=1)
    data = bytearray((folder / "a.tar").read_bytes())
    data[600] ^= 1
    (folder / "a.tar").write_bytes(data)
    split = Corpus.open(folder).split("train")
    with pytest.raises(BlockError, match=r"block 000000\.tar of shard .*a\.tar is corrupt"):
        split.read_block(0)
    assert len(split.read_block(1)) == 16


def test_long_names_and_folders_do_not_hurt(tmp_path: Path) -> None:
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        directory = tmp_path / str(form)
        directory.mkdir()
        with tarfile.open(directory / "x.tar", "w", format=form) as tar:
            for number in range(40):
                key = f"{'very-long-folder-name/' * 12}{number:04d}-\u00e9"
                for extension, content in (("smi", b"CCO"), ("txt", f"text {number}".encode())):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        index_shards(directory, workers=1)
        texts = [record["text"] for record in Corpus.open(directory).split("train")]
        assert texts == [f"text {number}" for number in range(40)]


def test_what_cannot_be_indexed_says_why(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(AtomasError, match=r"holds no \.tar file$"):
        index_shards(tmp_path / "empty")
    (tmp_path / "empty" / "x.tar.gz").touch()
    with pytest.raises(AtomasError, match=r"x\.tar\.gz is compressed"):
        index_shards(tmp_path / "empty")
    (tmp_path / "empty" / "x.tar").write_bytes(b"nothing" * 300)
    with pytest.raises(AtomasError, match=r"x\.tar cannot be read as a tar"):
        index_shards(tmp_path / "empty", workers=1)
    (folder / "a.tar").write_bytes((folder / "a.tar").read_bytes()[:5000])
    with pytest.raises(AtomasError, match=r"a\.tar cannot be read as a tar"):
        index_shards(folder, workers=1)
    (folder / "a.tar").unlink()
    index_shards(folder, workers=1)
    with pytest.raises(AtomasError, match=r"has an index\.json already"):
        index_shards(folder, workers=1)
