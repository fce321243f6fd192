"""The stream: the same global batches for any ranks and workers, resumed anywhere, broken blocks named."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from atomas.config import Config, DataConfig, LossConfig, RunConfig
from atomas.data.batching import PairBatch, RaggedTokens
from atomas.data.block_cache import BlockCache
from atomas.data.corpora import Corpora
from atomas.data.lengths import TokenLengths
from atomas.data.order import GlobalOrder
from atomas.data.shard_index import write_index
from atomas.data.shard_writer import ShardWriter
from atomas.data.shards import Corpus
from atomas.data.stream import PairStream, Source, build_loader, evaluation_batches
from atomas.data.tokenizer import AtomasTokenizer
from atomas.errors import AtomasError

NUM_RECORDS, BLOCK_SIZE, BATCH_SIZE = 203, 10, 12


def record(number: int) -> dict[str, str]:
    smiles = "C" * (number % 23 + 1) + "(=O)" * (number % 3)
    return {"smiles": smiles, "text": f"compound {number} " * (number % 17 + 1), "inchikey": f"key-{number}"}


def write_corpus(directory: Path, count: int = NUM_RECORDS) -> Corpus:
    with ShardWriter(directory, "train", block_size=BLOCK_SIZE, shard_bytes=16 * 1024) as writer:
        for number in range(count):
            writer.write(record(number))
    write_index(directory, {"train": writer.index()}, counts={}, hazards={}, sources=[], options={})
    return Corpus.open(directory)


@pytest.fixture(scope="module")
def tokenizer() -> AtomasTokenizer:
    texts = [record(number)[name] for number in range(60) for name in ("smiles", "text")]
    return AtomasTokenizer.train(texts, 400)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return write_corpus(tmp_path / "corpus")


def make_stream(corpus: Corpus, tokenizer: AtomasTokenizer, **ranks: int) -> PairStream:
    split = corpus.split("train")
    lengths = TokenLengths.measure(split, tokenizer)
    order = GlobalOrder([block.num_records for block in split.blocks], seed=1, window_blocks=3)
    source = Source(split=split, lengths=lengths)
    return PairStream([source], tokenizer, order, batch_size=BATCH_SIZE, max_text_tokens=40, **ranks)


def rows(tokens: RaggedTokens) -> list[list[int]]:
    return [row.tolist() for row in tokens.ids.split(tokens.lengths.tolist())]


def pairs(batch: PairBatch) -> list[tuple[int, ...]]:
    """Everything a batch says of each pair, comparable."""
    return [
        (sample, molecule, text, *words, -1, *atoms)
        for sample, molecule, text, words, atoms in zip(
            batch.sample_id.tolist(),
            batch.molecule_id.tolist(),
            batch.text_id.tolist(),
            rows(batch.text),
            rows(batch.smiles),
            strict=True,
        )
    ]


def test_a_batch_holds_the_records_of_its_positions(corpus: Corpus, tokenizer: AtomasTokenizer) -> None:
    stream = make_stream(corpus, tokenizer)
    records = list(corpus.split("train"))
    for number in (0, 7, 40):
        batch = stream[number]
        expected = stream.order.indices(number * BATCH_SIZE, (number + 1) * BATCH_SIZE)
        assert sorted(batch.sample_id.tolist()) == sorted(expected.tolist())
        for sample, text, smiles in zip(batch.sample_id, rows(batch.text), rows(batch.smiles), strict=True):
            own = records[int(sample)]
            assert tokenizer.decode(smiles) == own["smiles"]
            assert tokenizer.normalize(own["text"]).startswith(tokenizer.decode(text))
            assert len(text) <= 40
            assert text[-1] == smiles[-1] == 1


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_global_batch_is_the_same_for_any_ranks_and_workers(
    corpus: Corpus, tokenizer: AtomasTokenizer, world_size: int, workers: int
) -> None:
    whole = make_stream(corpus, tokenizer)
    loaders = [
        build_loader(
            make_stream(corpus, tokenizer, rank=rank, world_size=world_size),
            range(20),
            num_workers=workers,
        )
        for rank in range(world_size)
    ]
    for number, parts in enumerate(zip(*loaders, strict=True)):
        assert {len(part) for part in parts} == {BATCH_SIZE // world_size}
        assert sorted(pair for part in parts for pair in pairs(part)) == sorted(pairs(whole[number]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_resumed_in_the_middle_of_an_epoch(
    corpus: Corpus, tokenizer: AtomasTokenizer, workers: int
) -> None:
    def run(start: int, stop: int) -> Iterator[list[tuple[int, ...]]]:
        stream = make_stream(corpus, tokenizer, rank=1, world_size=2)
        return map(pairs, build_loader(stream, range(start, stop), num_workers=workers))

    whole = list(run(0, 40))
    assert whole == [*islice(run(0, 40), 11), *run(11, 40)]
    assert len(whole) == 40
    assert len(list(run(40, 40))) == 0


def test_every_epoch_shows_every_pair_once(corpus: Corpus, tokenizer: AtomasTokenizer) -> None:
    stream = make_stream(corpus, tokenizer)
    seen = [sample for number in range(NUM_RECORDS) for sample in stream[number].sample_id.tolist()]
    assert Counter(seen) == dict.fromkeys(range(NUM_RECORDS), BATCH_SIZE), "B epochs are N batches"


def test_ranks_get_like_numbers_of_tokens(corpus: Corpus, tokenizer: AtomasTokenizer) -> None:
    streams = [make_stream(corpus, tokenizer, rank=rank, world_size=3) for rank in range(3)]
    tokens = np.array(
        [[len(s[number].text.ids) + len(s[number].smiles.ids) for s in streams] for number in range(30)]
    )
    spread = (tokens.max(axis=1) - tokens.min(axis=1)) / tokens.mean(axis=1)
    assert spread.mean() < 0.15


def test_a_world_size_that_does_not_divide_the_batch_is_refused(
    corpus: Corpus, tokenizer: AtomasTokenizer
) -> None:
    with pytest.raises(AtomasError, match=r"batch_size = 12 .* 5 ranks; .*: 1, 2, 3, 4, 6, 12$"):
        make_stream(corpus, tokenizer, world_size=5)


def test_a_corpus_smaller_than_a_batch_is_refused(tmp_path: Path, tokenizer: AtomasTokenizer) -> None:
    with pytest.raises(AtomasError, match=r"has 11 usable pairs, fewer than data\.batch_size = 12"):
        make_stream(write_corpus(tmp_path / "small", BATCH_SIZE - 1), tokenizer)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_block_is_named_in_one_line(
    corpus: Corpus, tokenizer: AtomasTokenizer, workers: int
) -> None:
    stream = make_stream(corpus, tokenizer)
    split = corpus.split("train")
    shard = corpus.directory / split.shards[0].path
    with shard.open("r+b") as file:
        file.seek(split.blocks[1].offset + 5)
        file.write(b"\xff")
    loader = build_loader(stream, range(20), num_workers=workers)
    with pytest.raises(AtomasError) as caught:
        list(loader)
    message = str(caught.value)
    assert "000001.jsonl" in message
    assert shard.name in message
    assert "\n" not in message


def damage(corpus: Corpus, *blocks: int) -> None:
    split = corpus.split("train")
    for number in blocks:
        with (corpus.directory / split.shard_of(number).path).open("r+b") as file:
            file.seek(split.blocks[number].offset + 5)
            file.write(b"\xff")


def skipping_streams(
    corpora: Corpora, tokenizer: AtomasTokenizer, folder: Path, world_size: int
) -> list[PairStream]:
    config = Config(
        run=RunConfig(output_dir=str(folder), name="run", seed=4),
        data=DataConfig(batch_size=BATCH_SIZE, window_blocks=3, on_error="skip"),
    )
    return [
        PairStream.open(config, corpora, tokenizer, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("members", [1, 2])
def test_skipped_samples_are_replaced_alike_for_any_ranks_and_workers(
    tmp_path: Path, tokenizer: AtomasTokenizer, members: int
) -> None:
    opened = tuple(
        write_corpus(tmp_path / f"corpus{number}", NUM_RECORDS - 80 * number) for number in range(members)
    )
    corpora = Corpora(members=opened)
    epoch = sum(corpus.split("train").num_records for corpus in opened)
    sound = skipping_streams(corpora, tokenizer, tmp_path, 1)[0]
    expected = [
        sound.order.indices(n * BATCH_SIZE, (n + 1) * BATCH_SIZE).tolist() for n in range(epoch // BATCH_SIZE)
    ]
    for corpus in opened:
        damage(corpus, 2, 7)
    bad = {20 + i for i in range(10)} | {70 + i for i in range(10)}
    if members == 2:
        bad |= {NUM_RECORDS + sample for sample in bad}
    seen: list[list[tuple[int, ...]]] = []
    for world_size, workers in ((1, 0), (2, 2), (3, 1)):
        loaders = [
            build_loader(stream, range(len(expected)), num_workers=workers)
            for stream in skipping_streams(corpora, tokenizer, tmp_path, world_size)
        ]
        seen.append([])
        for number, parts in enumerate(zip(*loaders, strict=True)):
            assert {len(part) for part in parts} == {BATCH_SIZE // world_size}, "no rank is short of a sample"
            skipped = sorted((one for part in parts for one in part.skipped), key=lambda one: one.position)
            assert {one.sample for one in skipped} == bad & set(expected[number])
            read = Counter(sample for part in parts for sample in part.sample_id.tolist())
            assert read + Counter(one.sample for one in skipped) == Counter(expected[number]) + Counter(
                one.stand_in for one in skipped
            )
            assert not bad & set(read)
            seen[-1] += [tuple(pair) for part in parts for pair in sorted(pairs(part))]
            for one in skipped:
                assert one.shard.endswith(".tar")
                assert one.reason == "its checksum differs from the index"
                assert expected[number][one.position - number * BATCH_SIZE] == one.sample
    assert sorted(seen[0]) == sorted(seen[1]) == sorted(seen[2])


def test_a_shard_deleted_while_it_is_read_is_an_error_or_is_skipped(
    tmp_path: Path, tokenizer: AtomasTokenizer
) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    strict = make_stream(corpus, tokenizer)
    (stream,) = skipping_streams(Corpora.of(corpus), tokenizer, tmp_path, 1)
    shard = corpus.split("train").shards[0]
    (corpus.directory / shard.path).unlink()
    batches = [stream[number] for number in range(NUM_RECORDS // BATCH_SIZE)]
    skipped = [one.sample for batch in batches for one in batch.skipped]
    assert len(skipped) == len(set(skipped)) > shard.num_records - BATCH_SIZE
    assert max(skipped) < shard.num_records
    assert {one.reason for batch in batches for one in batch.skipped} == {"No such file or directory"}
    with pytest.raises(
        AtomasError, match=r"cannot read block .*shard-000000\.tar: No such file or directory"
    ):
        list(build_loader(strict, range(NUM_RECORDS // BATCH_SIZE), num_workers=0))


def test_too_many_in_a_row_are_an_error_and_so_are_too_many_in_all(
    tmp_path: Path, tokenizer: AtomasTokenizer
) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    (stream,) = skipping_streams(Corpora.of(corpus), tokenizer, tmp_path, 1)
    for shard in corpus.split("train").shards:
        (corpus.directory / shard.path).unlink()
    with pytest.raises(
        AtomasError, match=r"^101 samples in a row .* data\.max_consecutive_skips = 100; the last: cannot"
    ):
        stream[0]
    stream.policy.check_total(10_000, tmp_path)
    with pytest.raises(
        AtomasError, match=r"10001 samples were skipped, more than data\.max_skips = 10000: .*bad_samples"
    ):
        stream.policy.check_total(10_001, tmp_path)


def test_blocks_that_cannot_be_measured_are_left_out_and_listed(
    tmp_path: Path, tokenizer: AtomasTokenizer
) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    damage(corpus, 4)
    (stream,) = skipping_streams(Corpora.of(corpus), tokenizer, tmp_path, 1)
    assert len(stream.order) == NUM_RECORDS - BLOCK_SIZE
    (line,) = (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert (found["block"], found["records"], found["step"]) == ("000004.jsonl", BLOCK_SIZE, None)
    for number in range(NUM_RECORDS // BATCH_SIZE):
        assert not stream[number].skipped


def test_a_mixture_reads_every_corpus_by_its_weight(tmp_path: Path, tokenizer: AtomasTokenizer) -> None:
    opened = tuple(write_corpus(tmp_path / f"corpus{number}", 100 + 50 * number) for number in range(2))
    (stream,) = skipping_streams(Corpora(members=opened, shares=(3.0, 1.0)), tokenizer, tmp_path, 1)
    records = [list(corpus.split("train")) for corpus in opened]
    drawn = Counter[int]()
    for number in range(60):
        batch = stream[number]
        for sample, smiles in zip(batch.sample_id.tolist(), rows(batch.smiles), strict=True):
            which, own = (0, sample) if sample < 100 else (1, sample - 100)
            assert tokenizer.decode(smiles) == records[which][own]["smiles"]
            drawn[which] += 1
    assert drawn[0] / drawn.total() == pytest.approx(0.75, abs=0.05)


def test_files_weigh_by_the_pairs_that_the_build_has_kept(corpus: Corpus) -> None:
    sources = [
        {"weight": 3.0, "rows": 100, "rejected": 10, "excluded": 10, "deduplicated": 60},
        {"weight": 1.0, "rows": 20, "rejected": 0, "excluded": 0, "deduplicated": 0},
    ]
    corpus.index["sources"] = sources
    assert Corpora(members=(corpus, corpus)).mixing_weights([10, 20]) == [20, 40]


def test_a_batch_of_more_blocks_than_are_kept_reads_each_once(corpus: Corpus) -> None:
    read: list[int] = []

    def decode(number: int) -> int:
        read.append(number)
        return number

    blocks = BlockCache(corpus.split("train"), decode, 2)
    blocks.load(np.arange(5 * BLOCK_SIZE))
    assert [blocks[number] for number in (3, 0, 4, 1, 2, 0, 3)] == [3, 0, 4, 1, 2, 0, 3]
    assert sorted(read) == [0, 1, 2, 3, 4]
    assert [blocks[9], blocks[8]] == [9, 8]
    blocks.load(np.array([8 * BLOCK_SIZE]))
    assert len(blocks._blocks) == 2


def test_workers_leave_signals_to_the_parent(corpus: Corpus, tokenizer: AtomasTokenizer) -> None:
    loader = build_loader(make_stream(corpus, tokenizer), range(40), num_workers=2)
    others = multiprocessing.active_children()  # of loaders whose end another test did not wait for
    batches = iter(loader)
    first = next(batches)
    workers = [process for process in multiprocessing.active_children() if process not in others]
    assert len(workers) == 2
    for worker in workers:
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(worker.pid, name)
    assert len([first, *batches]) == 40


def test_a_process_that_fails_is_not_held_by_its_workers() -> None:
    code = """
from atomas.data.loader import OrderedLoader
class Numbers:
    def __getitem__(self, number): return number
items = iter(OrderedLoader(Numbers(), range(1000), num_workers=2))
next(items)
raise ValueError("a step that went wrong")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ValueError: a step that went wrong"


def test_lengths_are_those_of_the_tokens(corpus: Corpus, tokenizer: AtomasTokenizer) -> None:
    lengths = TokenLengths.measure(corpus.split("train"), tokenizer)
    records = list(corpus.split("train"))
    for name, column in (("text", lengths.text), ("smiles", lengths.smiles)):
        expected = [len(ids) for ids in tokenizer.encode_batch([record[name] for record in records])]
        assert column.tolist() == expected


def test_lengths_measured_in_parallel_are_the_same(tmp_path: Path, tokenizer: AtomasTokenizer) -> None:
    corpus = write_corpus(tmp_path / "many", 40 * BLOCK_SIZE + 3)
    lengths = TokenLengths.measure(corpus.split("train"), tokenizer)
    texts = [record["text"] for record in corpus.split("train")]
    assert lengths.text.tolist() == [len(ids) for ids in tokenizer.encode_batch(texts)]


def test_lengths_are_measured_once(
    corpus: Corpus, tokenizer: AtomasTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = TokenLengths.resolve(corpus, "train", tokenizer, tmp_path / "run")
    (file,) = (tmp_path / "run").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(TokenLengths, "measure", lambda *_: pytest.fail("measured again"))
        again = TokenLengths.resolve(corpus, "train", tokenizer, tmp_path / "run")
    assert np.array_equal(first.text, again.text)
    assert np.array_equal(first.smiles, again.smiles)
    other = AtomasTokenizer.train(["CCO"], 400)
    TokenLengths.resolve(corpus, "train", other, tmp_path / "run")
    assert len(list((tmp_path / "run").iterdir())) == 2, "another tokenizer, another file"
    assert file.exists()


def test_long_pairs_are_dropped_or_cut_and_counted() -> None:
    lengths = TokenLengths(
        text=np.array([5, 50, 5, 50, 10], dtype=np.uint16),
        smiles=np.array([5, 5, 50, 50, 10], dtype=np.uint16),
    )
    read = lengths.select(max_text_tokens=10, max_smiles_tokens=10, text_is_written=False)
    assert read.eligible.tolist() == [True, True, False, False, True]
    assert (read.dropped_smiles, read.dropped_texts, read.cut_texts) == (2, 0, 1)
    written = lengths.select(max_text_tokens=10, max_smiles_tokens=10, text_is_written=True)
    assert written.eligible.tolist() == [True, False, False, False, True]
    assert (written.dropped_smiles, written.dropped_texts, written.cut_texts) == (2, 1, 0)


@pytest.mark.parametrize("task", ["genmol", "gentext"])
def test_a_run_opens_its_stream_from_its_configuration(
    corpus: Corpus, tokenizer: AtomasTokenizer, tmp_path: Path, task: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config(
        run=RunConfig(output_dir=str(tmp_path), name="run", seed=4),
        data=DataConfig(batch_size=8, max_text_tokens=20, max_smiles_tokens=8, window_blocks=2),
        loss=LossConfig(task=task),  # type: ignore[arg-type]
    )
    with caplog.at_level("INFO"):
        stream = PairStream.open(config, Corpora.of(corpus), tokenizer)
    lengths = TokenLengths.measure(corpus.split("train"), tokenizer)
    usable = lengths.smiles <= 8
    if task == "gentext":
        usable &= lengths.text <= 20
    assert 0 < len(stream.order) == usable.sum() < NUM_RECORDS
    assert f"{usable.sum()} pairs of {NUM_RECORDS}" in caplog.text
    for number in range(30):
        batch = stream[number]
        assert int(batch.smiles.lengths.max()) <= 8
        assert int(batch.text.lengths.max()) <= 20
    assert [path.name.split("-")[0] for path in (tmp_path / "run").iterdir()] == ["lengths"]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("max_pairs", "batch_size"), [(None, 16), (50, 7), (2, 64), (500, 203)])
def test_evaluation_shows_each_record_once_and_keeps_ranks_in_step(
    corpus: Corpus, tokenizer: AtomasTokenizer, world_size: int, max_pairs: int | None, batch_size: int
) -> None:
    split = corpus.split("train")
    ranks = [
        list(
            evaluation_batches(
                split, tokenizer, batch_size=batch_size, rank=rank, world_size=world_size, max_pairs=max_pairs
            )
        )
        for rank in range(world_size)
    ]
    assert len({tuple(len(batch) for batch, _ in batches) for batches in ranks}) == 1
    assert all(len(batch) <= batch_size for batch, _ in ranks[0])
    real = [batch.sample_id[:count] for batches in ranks for batch, count in batches]
    assert sorted(torch.cat(real).tolist()) == list(range(min(max_pairs or NUM_RECORDS, NUM_RECORDS)))
    records = list(split)
    for batch, _ in ranks[-1]:
        for sample, smiles in zip(batch.sample_id, rows(batch.smiles), strict=True):
            assert tokenizer.decode(smiles) == records[int(sample)]["smiles"]


def test_real_records_stream_fast_enough(shared_data: Path, tmp_path: Path) -> None:
    lines = (shared_data / "chebi20" / "validation.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    with ShardWriter(tmp_path, "train") as writer:
        for line in lines:
            key, smiles, text = line.split("\t")
            writer.write({"smiles": smiles, "text": text, "inchikey": key})
    write_index(tmp_path, {"train": writer.index()}, counts={}, hazards={}, sources=[], options={})
    split = Corpus.open(tmp_path).split("train")
    tokenizer = AtomasTokenizer.load(shared_data / "tokenizers" / "t5")
    lengths = TokenLengths.measure(split, tokenizer)
    order = GlobalOrder([block.num_records for block in split.blocks], seed=0, window_blocks=64)
    source = Source(split=split, lengths=lengths)
    stream = PairStream([source], tokenizer, order, batch_size=64, max_text_tokens=512)
    started = time.process_time()
    for number in range(40):
        assert len(stream[number]) == 64
    rate = 40 * 64 / (time.process_time() - started)
    print(f"{rate:.0f} pairs/s on one core")
    assert rate > 1500, "a quarter of what an idle core does"
