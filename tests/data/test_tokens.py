"""Tokens beside the shards: the same batches as from the records, for the right tokenizer and no other."""

import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atomas.cli import main
from atomas.config import Config, DataConfig, RunConfig
from atomas.data.batching import PairBatch, collate
from atomas.data.corpora import Corpora
from atomas.data.lengths import LONGEST, TokenLengths, stored_lengths
from atomas.data.shard_index import file_sha256, rewrite_index, write_index
from atomas.data.shard_writer import ShardWriter
from atomas.data.shards import Corpus
from atomas.data.stream import PairStream
from atomas.data.tokenizer import AtomasTokenizer
from atomas.data.tokens import TokenReader, encode_block, open_tokens, token_lengths, tokenize_corpus
from atomas.errors import AtomasError

COUNT = 120


def record(number: int) -> dict[str, str]:
    smiles = "C" * (number % 23 + 1) + "(=O)" * (number % 3)
    return {
        "smiles": smiles,
        "text": f"compound {number} " * (number % 17 + 1),
        "inchikey": f"key-{number % 50}",
    }


def write_corpus(directory: Path, count: int = COUNT) -> Path:
    indexes = {}
    for name, records in (("train", range(count)), ("validation", range(count, count + 15))):
        with ShardWriter(directory, name, block_size=10, shard_bytes=8 * 1024) as writer:
            for number in records:
                writer.write(record(number))
        indexes[name] = writer.index()
    write_index(directory, indexes, counts={}, hazards={}, sources=[], options={})
    return directory


@pytest.fixture(scope="module")
def tokenizer() -> AtomasTokenizer:
    return AtomasTokenizer.train([record(n)[name] for n in range(60) for name in ("smiles", "text")], 400)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")


def tensors(batch: PairBatch) -> list[torch.Tensor]:
    return [
        batch.text.ids, batch.text.lengths, batch.smiles.ids, batch.smiles.lengths,
        batch.molecule_id, batch.text_id, batch.sample_id,
    ]  # fmt: skip


def same(one: PairBatch, other: PairBatch) -> bool:
    pairs = zip(tensors(one), tensors(other), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_batches_are_those_of_the_records(
    directory: Path, tokenizer: AtomasTokenizer, compression: Any
) -> None:
    tokenize_corpus(directory, tokenizer, compression=compression)
    corpus = Corpus.open(directory)
    tokens = open_tokens(corpus, tokenizer)
    assert tokens is not None
    records = list(corpus.split("train"))
    reader = TokenReader(tokens.split("train"), cached_blocks=3)
    generator = np.random.default_rng(0)
    for limit in (None, 9):
        for _ in range(20):
            members = generator.integers(0, COUNT, size=11)
            expected = collate(
                [records[i] for i in members], tokenizer, sample_ids=members, max_text_tokens=limit
            )
            assert same(reader.collate(members, limit), expected)


def test_lengths_are_those_that_are_measured(directory: Path, tokenizer: AtomasTokenizer) -> None:
    tokenize_corpus(directory, tokenizer)
    corpus = Corpus.open(directory)
    tokens = open_tokens(corpus, tokenizer)
    assert tokens is not None
    for name in ("train", "validation"):
        stored, measured = token_lengths(tokens, name), TokenLengths.measure(corpus.split(name), tokenizer)
        assert np.array_equal(stored.text, measured.text)
        assert np.array_equal(stored.smiles, measured.smiles)
        assert isinstance(stored.text, np.memmap), "mapped, not read"
    path = tokens.directory / "train" / "lengths.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(AtomasError, match=r"lengths\.npy is damaged"):
        token_lengths(tokens, "train")


@pytest.mark.parametrize("name", ["lengths.npy", "shard-000000.tar"])
def test_damage_of_equal_size_is_mended_by_the_same_command(
    directory: Path, tokenizer: AtomasTokenizer, name: str
) -> None:
    folder = tokenize_corpus(directory, tokenizer)
    path = folder / "train" / name
    good, index = path.read_bytes(), (folder / "index.json").read_bytes()
    path.write_bytes(good[:-3] + bytes([good[-3] ^ 1]) + good[-2:])
    tokenize_corpus(directory, tokenizer)
    assert path.read_bytes() == good
    assert (folder / "index.json").read_bytes() == index


def test_bytes_do_not_depend_on_workers(directory: Path, tokenizer: AtomasTokenizer, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other")
    one, two = tokenize_corpus(directory, tokenizer, workers=1), tokenize_corpus(other, tokenizer, workers=2)
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    assert len([name for name in files if name.suffix == ".tar"]) > 3
    for name in files:
        assert file_sha256(one / name) == file_sha256(two / name), name


def config_of(tmp_path: Path, **data: Any) -> Config:
    return Config(
        run=RunConfig(output_dir=str(tmp_path), name="run"),
        data=DataConfig(batch_size=8, max_text_tokens=20, window_blocks=3, **data),
    )


def test_a_run_trains_on_the_tokens(
    directory: Path, tokenizer: AtomasTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_records = PairStream.open(config_of(tmp_path), Corpora.of(Corpus.open(directory)), tokenizer)
    expected = [from_records[number] for number in range(30)]
    tokenize_corpus(directory, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(AtomasTokenizer, "encode_batch", lambda *_: pytest.fail("tokenized"))
        stream = PairStream.open(config_of(tmp_path), Corpora.of(Corpus.open(directory)), tokenizer)
        assert all(same(stream[number], batch) for number, batch in enumerate(expected))


def test_tokens_of_another_tokenizer_are_refused(
    directory: Path, tokenizer: AtomasTokenizer, tmp_path: Path
) -> None:
    other = AtomasTokenizer.train(["CCO", "an alcohol"], 400)
    tokenize_corpus(directory, tokenizer)
    corpus = Corpus.open(directory)
    with pytest.raises(
        AtomasError, match=rf"{tokenizer.fingerprint[:16]}.*not of the run's \({other.fingerprint[:16]}"
    ):
        PairStream.open(config_of(tmp_path), Corpora.of(corpus), other)
    assert len(PairStream.open(config_of(tmp_path, tokens="ignore"), Corpora.of(corpus), other)[0]) == 8
    tokenize_corpus(directory, other)
    for each in (tokenizer, other):
        assert open_tokens(Corpus.open(directory), each) is not None


def test_a_corpus_without_tokens_has_none(directory: Path, tokenizer: AtomasTokenizer) -> None:
    assert open_tokens(Corpus.open(directory), tokenizer) is None


def test_tokens_of_other_records_are_refused(
    directory: Path, tokenizer: AtomasTokenizer, tmp_path: Path
) -> None:
    folder = tokenize_corpus(directory, tokenizer)
    index = Corpus.open(directory).index
    other = write_corpus(tmp_path / "other", COUNT - 1)
    folder.rename(other / folder.name)
    changed = Corpus.open(other).index | {"tokens": index["tokens"]}
    rewrite_index(other, changed)
    with pytest.raises(AtomasError, match="does not belong to the records beside it"):
        open_tokens(Corpus.open(other), tokenizer)
    with pytest.raises(AtomasError, match=r"its tokens cannot be used .* run `atomas data tokenize"):
        open_tokens(Corpus.open(directory), tokenizer)
    tokenize_corpus(other, tokenizer)
    assert open_tokens(Corpus.open(other), tokenizer) is not None


def test_a_flipped_bit_is_named(directory: Path, tokenizer: AtomasTokenizer) -> None:
    tokenize_corpus(directory, tokenizer)
    tokens = open_tokens(Corpus.open(directory), tokenizer)
    assert tokens is not None
    split = tokens.split("train")
    shard = tokens.directory / split.shards[0].path
    with shard.open("r+b") as file:
        file.seek(split.blocks[1].offset + 40)
        file.write(b"\xff")
    with pytest.raises(AtomasError, match=r"block 000001\.safetensors of shard .* is corrupt"):
        TokenReader(split, 2).collate(np.array([0, 15]))


def _slow_work(directory: Path, tokenizer: AtomasTokenizer) -> None:
    import atomas.data.tokens as tokens

    def slow(*arguments: Any) -> Any:
        time.sleep(0.05)
        return encode_block(*arguments)

    tokens.encode_block = slow  # type: ignore[assignment]
    tokenize_corpus(directory, tokenizer, workers=1)


def test_killed_work_is_continued(
    directory: Path, tokenizer: AtomasTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = directory / f".tokens-{tokenizer.fingerprint[:16]}.partial"
    process = multiprocessing.get_context("fork").Process(target=_slow_work, args=(directory, tokenizer))
    process.start()
    deadline = time.monotonic() + 60
    while not list(partial.glob("work/train-*.json")):
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert open_tokens(Corpus.open(directory), tokenizer) is None, "nothing half-written is named"
    finished = len(list(partial.glob("work/train-*.json")))
    encoded = []

    def counted(records: Any, own: Any) -> Any:
        encoded.append(len(records))
        return encode_block(records, own)

    monkeypatch.setattr("atomas.data.tokens.encode_block", counted)
    folder = tokenize_corpus(directory, tokenizer, workers=1)
    shards = Corpus.open(directory).split("train").shards
    assert sum(encoded) == 15 + sum(shard.num_records for shard in shards[finished:]) < COUNT + 15
    whole = tokenize_corpus(write_corpus(tmp_path / "other"), tokenizer, workers=1)
    for path in whole.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (folder / path.relative_to(whole)).read_bytes()
    assert not list(directory.glob(".tokens-*"))
    encoded.clear()
    tokenize_corpus(directory, tokenizer)
    assert not encoded, "done once"


def test_a_disk_that_cannot_be_written_is_one_line(
    directory: Path, tokenizer: AtomasTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", str(directory))

    monkeypatch.setattr(ShardWriter, "write_block", full)
    with pytest.raises(AtomasError, match=r"No space left on device; make room .* goes on where it stopped"):
        tokenize_corpus(directory, tokenizer)


def test_long_sequences_stay_longer_than_every_limit() -> None:
    lengths = stored_lengths([5, LONGEST, LONGEST + 1, 10**6])
    assert lengths.tolist() == [5, LONGEST, LONGEST + 1, LONGEST + 1]
    selected = TokenLengths(text=lengths, smiles=lengths).select(
        max_text_tokens=LONGEST, max_smiles_tokens=LONGEST, text_is_written=False
    )
    assert selected.eligible.tolist() == [True, True, False, False]
    with pytest.raises(AtomasError, match="is the longest there is"):
        TokenLengths(text=lengths, smiles=lengths).select(
            max_text_tokens=LONGEST + 1, max_smiles_tokens=5, text_is_written=False
        )


def test_the_command_tokenizes_as_runs_do(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["data", "tokenize", str(directory), "--tokenizer", "corpus", "--vocab-size", "400"])
    (folder,) = directory.glob("tokens-*")
    assert f"tokens: {folder}" in capsys.readouterr().out
    assert AtomasTokenizer.load(folder).fingerprint.startswith(folder.name.removeprefix("tokens-"))
    with pytest.raises(SystemExit):
        main(["data", "tokenize", str(tmp_path / "none"), "--tokenizer", "corpus"])


def test_a_corpus_with_tokens_is_built_again_without_force(
    tmp_path: Path, tokenizer: AtomasTokenizer
) -> None:
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text(
        "SMILES\tdescription\n" + "".join(f"{'C' * n}O\tan alcohol of {n}\n" for n in range(1, 30))
    )
    out = tmp_path / "built"
    main(["data", "build", str(pairs), "--out", str(out), "--workers", "1"])
    tokenize_corpus(out, tokenizer)
    main(["data", "build", str(pairs), "--out", str(out), "--workers", "1"])
    assert open_tokens(Corpus.open(out), tokenizer) is None, "of the corpus before"


@pytest.mark.parametrize("tokenized", [False, True])
def test_a_stream_reaches_a_process_that_is_not_forked(
    directory: Path, tokenizer: AtomasTokenizer, tmp_path: Path, tokenized: bool
) -> None:
    if tokenized:
        tokenize_corpus(directory, tokenizer)
    stream = PairStream.open(config_of(tmp_path), Corpora.of(Corpus.open(directory)), tokenizer)
    sent = pickle.dumps(stream)
    assert len(sent) < 100_000 + len(tokenizer._backend.to_str())
    assert all(same(stream[number], pickle.loads(sent)[number]) for number in (0, 3))
