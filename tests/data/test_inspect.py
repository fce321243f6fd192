"""`atomas data inspect` and the tables: right numbers, readable in a pipe."""

import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from atomas.data.build import BuildOptions, build_corpus
from atomas.data.building.engine import Local
from atomas.data.inspect import OrderOptions, histogram, inspect_corpus
from atomas.data.report import list_warnings
from atomas.data.shard_index import write_index
from atomas.data.shard_writer import ShardWriter
from atomas.data.shards import Corpus
from atomas.data.shuffle_quality import measure_shuffle
from atomas.errors import AtomasError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = [f"{'C' * (i % 20 + 1)}\ttext [red] number {i}" for i in range(300)]
    (tmp_path / "pairs.tsv").write_text("\n".join(["smiles\ttext", *rows]) + "\n")
    fractions = {"train": 0.9, "test": 0.1}
    files = {"train": [str(tmp_path / "pairs.tsv")]}
    build_corpus(files, tmp_path / "corpus", BuildOptions(engine=Local(workers=1), fractions=fractions))
    return tmp_path / "corpus"


def test_counts_histograms_and_samples(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_corpus(corpus, samples=2)
    printed = capsys.readouterr().out
    assert "train: length of smiles in characters" in printed
    assert "test: length of text in characters" in printed
    assert "tokens" not in printed
    first, middle = (
        f"train[{number}]" for number in (0, Corpus.open(corpus).split("train").num_records // 2)
    )
    assert first in printed
    assert middle in printed
    assert "text [red] number" in printed
    assert "\x1b" not in printed


def test_lengths_in_tokens(corpus: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_corpus(corpus, tokenizer=str(shared_data / "tokenizers/t5"), samples=0)
    printed = capsys.readouterr().out
    assert "train: length of smiles in tokens" in printed
    assert "train[0]" not in printed


def test_damage_is_found_while_reading(corpus: Path) -> None:
    split = Corpus.open(corpus).split("train")
    shard = corpus / split.shards[0].path
    data = bytearray(shard.read_bytes())
    data[split.blocks[0].offset + 10] ^= 1
    shard.write_bytes(data)
    with pytest.raises(AtomasError, match=r"block 000000.jsonl of shard .* is corrupt"):
        inspect_corpus(corpus)


def test_histogram_counts_everything_once() -> None:
    lengths = np.array([0, 1, 7, 8, 15, 16, 1598], dtype=np.int64)
    table = histogram(lengths, "title", "characters")
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    rows = re.findall(r"(\d+)-(\d+) \S\s+(\d+) ", capture.get())
    assert [(int(a), int(b), int(n)) for a, b, n in rows if int(n)] == [
        (0, 7, 3),
        (8, 15, 2),
        (16, 31, 1),
        (1024, 2047, 1),
    ]
    assert "mean 235.0, median 8, 99 % below 1503, longest 1598" in capture.get()


def test_warnings() -> None:
    alignment = {"verdict": "misaligned", "auc": 0.5, "rows": 900, "suspect_lines": []}
    partly = {"verdict": "partly misaligned", "auc": 0.8, "rows": 900, "suspect_lines": [[500, 800]]}
    index = {
        "alignment": {"a.txt": alignment, "b.txt": partly, "c.txt": alignment | {"verdict": "aligned"}},
        "counts": {
            "rows": 100,
            "rejected": 20,
            "overlap": [{"splits": ["train", "test"], "molecules": 7, "texts": 0}],
        },
    }
    warnings = list_warnings(index)
    assert [warning.split(":")[0].split(" (")[0][:40] for warning in warnings] == [
        "a.txt is MISALIGNED",
        "b.txt is PARTLY MISALIGNED",
        "splits train and test share 7 molecules",
        "20 of 100 rows were rejected",
    ]
    assert "around lines 500-800" in warnings[1]


def test_the_order_mixes_sorted_shards(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ShardWriter(corpus.parent / "sorted", "train", block_size=20, shard_bytes=20_000) as writer:
        for number in range(8000):
            writer.write({"smiles": "C", "text": str(number)})
    write_index(
        corpus.parent / "sorted", {"train": writer.index()}, counts={}, hazards={}, sources=[], options={}
    )
    split = Corpus.open(corpus.parent / "sorted").split("train")
    assert len(split.shards) > 10
    well = measure_shuffle(split, window_blocks=64, group_shards=64)
    assert abs(well.neighbours) < 0.03
    assert well.same_block == pytest.approx(19 / (64 * 20 - 1), abs=0.01)
    badly = measure_shuffle(split, window_blocks=1, group_shards=1)
    assert badly.neighbours > 0.9
    assert badly.same_block > 0.9
    inspect_corpus(
        str(corpus.parent / "sorted"), samples=0, order=OrderOptions(window_blocks=1, group_shards=1)
    )
    printed = capsys.readouterr().out
    assert f"{badly.neighbours:+.4f}" in printed
    assert "windows of 1 blocks, groups of 1 shards; 8,000 samples" in printed
