"""Corpora: fewer shards than workers, and damage in every part of a shard."""

import time

import pytest

from atomas.data.shard_index import write_index
from atomas.data.shard_writer import ShardWriter
from atomas.data.shards import Corpus
from atomas.data.stream import build_loader
from atomas.data.tokenizer import AtomasTokenizer
from tests.data.test_stream import BATCH_SIZE, make_stream, pairs, record

WORLD, WORKERS, BATCHES = 4, 3, 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """One shard."""
    folder = tmp_path_factory.mktemp("one") / "corpus"
    with ShardWriter(folder, "train", block_size=10, shard_bytes=2**20) as writer:
        for number in range(120):
            writer.write(record(number))
    write_index(folder, {"train": writer.index()}, counts={}, hazards={}, sources=[], options={})
    assert len(list(folder.rglob("*.tar"))) == 1
    return Corpus.open(folder)


def test_one_shard_for_four_ranks_of_three_workers(corpus: Corpus) -> None:
    """None waits for a shard of its own; together they read what one process reads."""
    texts = [record(number)[name] for number in range(60) for name in ("smiles", "text")]
    tokenizer = AtomasTokenizer.train(texts, 400)
    whole = make_stream(corpus, tokenizer)
    started = time.monotonic()
    loaded = [
        list(
            build_loader(
                make_stream(corpus, tokenizer, rank=rank, world_size=WORLD),
                range(BATCHES),
                num_workers=WORKERS,
            )
        )
        for rank in range(WORLD)
    ]
    for number, parts in enumerate(zip(*loaded, strict=True)):
        assert {len(part) for part in parts} == {BATCH_SIZE // WORLD}
        assert sorted(pair for part in parts for pair in pairs(part)) == sorted(pairs(whole[number]))
    assert time.monotonic() - started < 120
