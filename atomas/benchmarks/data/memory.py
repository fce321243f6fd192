"""`atomas bench data-memory`: what a loader process holds over millions of pairs, and what the index of many takes."""

import argparse
import gc
import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from atomas.errors import AtomasError

T = TypeVar("T")

DESCRIPTION = (
    "Stream a generated corpus of short tokenized pairs through one loader process, an epoch from end to end, and\n"
    "record what that process holds: its resident memory, and the part of it that it shares with nobody. Exit code 2\n"
    "where the second half holds more than the first. Then make the index, the order and the lengths of a corpus of\n"
    "100 million pairs, and record what they take."
)
EXAMPLE = "--pairs 5000000 --json docs/results/data/memory.json"
BLOCK_RECORDS = 256
SEPARATE_BLOCKS = 64
"""Blocks of the corpus that differ; they are repeated, for the sake of the time it takes to generate them."""
SCALE_PAIRS = 100_000_000
TOLERANCE_MB = 4.0
"""Of the growth from the first half to the second: pages that the allocator takes and gives back."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--pairs", type=int, default=5_000_000, metavar="N", help="pairs of the corpus (default: 5,000,000)")
    add("--batch", type=int, default=256, metavar="B", help="pairs in a batch (default: 256)")
    add("--samples", type=int, default=100, metavar="N", help="times that memory is looked at (default: 100)")
    add("--json", type=Path, metavar="FILE", help="the report")


def run(options: argparse.Namespace) -> None:
    """Measure, print and write the report; AtomasError where a loader's memory grows."""
    import torch

    from atomas.viz.data_benchmark import loader_memory_table
    from atomas_kernels.bench import report as kernels_report

    if options.pairs < 20 * options.batch:
        raise AtomasError(f"--pairs {options.pairs}: at least 20 batches of {options.batch} are needed")
    report = kernels_report.head(torch.device("cpu"), ("numpy", "safetensors", "psutil")) | {
        "benchmark": "data-memory",
        "pairs": options.pairs,
        "length_distribution": None,
        "scale": measure_scale(SCALE_PAIRS),
    }
    with tempfile.TemporaryDirectory(prefix="atomas-bench-memory-") as scratch:
        report["rows"] = stream_epoch(Path(scratch), options.pairs, options.batch, options.samples)
    print(loader_memory_table(report))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
        print(options.json)
    grown = growth_mb(report["rows"])
    if grown > TOLERANCE_MB:
        raise AtomasError(
            f"the loader's own memory grew by {grown:.1f} MiB from the first half to the second"
        )


def growth_mb(rows: list[dict[str, Any]]) -> float:
    """Most memory of its own that the loader held in the second half, less that in the first, MiB."""
    half = len(rows) // 2
    first, second = (max(row["worker_own_mb"] for row in part) for part in (rows[:half], rows[half:]))
    return float(second - first)


def stream_epoch(folder: Path, pairs: int, batch_size: int, samples: int) -> list[dict[str, Any]]:
    """Memory of the loader's process and of this one, MiB, after equal parts of an epoch."""
    import psutil

    from atomas.data.loader import OrderedLoader

    stream = _stream(folder, pairs, batch_size)
    loader = OrderedLoader(stream, range(pairs // batch_size), num_workers=1)
    already = {process.pid for process in psutil.Process().children()}
    batches = iter(loader)
    seen = len(next(batches))
    (worker,) = (process for process in psutil.Process().children() if process.pid not in already)
    rows, every = [], max(1, len(range(pairs // batch_size)) // samples)
    started = time.perf_counter()
    while part := sum(map(len, islice(batches, every))):
        seen += part
        if not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE:
            break  # it has handed over its last batch
        held, own = worker.memory_full_info(), psutil.Process().memory_full_info()
        rows.append(
            {
                "pairs": seen,
                "worker_resident_mb": held.rss / 2**20,
                "worker_own_mb": held.uss / 2**20,
                "own_resident_mb": own.rss / 2**20,
                "seconds": time.perf_counter() - started,
            }
        )
    return rows


def _stream(folder: Path, pairs: int, batch_size: int) -> Any:
    """The stream of training over a generated corpus."""
    from atomas.data.order import GlobalOrder
    from atomas.data.shards import Corpus
    from atomas.data.stream import PairStream, Source
    from atomas.data.tokenizer import AtomasTokenizer
    from atomas.data.tokens import token_lengths

    texts = [f"compound {number} is an alcohol" for number in range(100)] + ["CCO", "CC(=O)O"]
    tokenizer = AtomasTokenizer.train(texts, 400)
    _generate(folder, pairs, tokenizer)
    tokens = Corpus.open(folder)
    split = tokens.split("train")
    order = GlobalOrder(split.blocks.num_records, seed=0, window_blocks=64)
    source = Source(split=split, lengths=token_lengths(tokens, "train"), tokens=split)
    return PairStream([source], tokenizer, order, batch_size=batch_size, max_text_tokens=64)


def _generate(folder: Path, pairs: int, tokenizer: Any) -> None:
    """Token shards of short pairs."""
    import numpy as np

    from atomas.data.lengths import TokenLengths
    from atomas.data.progress import Progress
    from atomas.data.shard_index import file_sha256, write_index
    from atomas.data.shard_writer import ShardWriter
    from atomas.data.tokens import encode_block

    encoded = []
    for block in range(SEPARATE_BLOCKS):
        numbers = range(block * BLOCK_RECORDS, (block + 1) * BLOCK_RECORDS)
        records = [
            {"text": f"compound {n % 89} is an alcohol " * (1 + n % 3), "smiles": "C" * (1 + n % 30) + "O",
             "inchikey": str(n)}
            for n in numbers
        ]  # fmt: skip
        encoded.append(encode_block(records, tokenizer))
    lengths = []
    with (
        ShardWriter(folder, "train", kind="safetensors") as writer,
        Progress("generating", pairs, unit="pairs") as progress,
    ):
        for number in range(pairs // BLOCK_RECORDS):
            data, sizes = encoded[number % SEPARATE_BLOCKS]
            writer.write_block(data, BLOCK_RECORDS)
            lengths.append(sizes)
            progress.update(BLOCK_RECORDS)
    text, smiles = np.concatenate(lengths, axis=1)
    TokenLengths(text=text, smiles=smiles).save(folder / "train" / "lengths.npy")
    write_index(
        folder, {"train": writer.index()}, counts={}, hazards={}, sources=[], options={},
        lengths={"train": file_sha256(folder / "train" / "lengths.npy")},
    )  # fmt: skip


def _held(make: Callable[[], T]) -> tuple[T, float, float]:
    """What `make` returns, the MB that it holds, and the seconds that another call takes."""
    started = time.perf_counter()
    make()
    seconds = time.perf_counter() - started
    tracemalloc.start()
    made = make()
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return made, held / 1e6, seconds


def measure_scale(pairs: int) -> dict[str, Any]:
    """What every process holds of the index of so many pairs, MB, and the seconds it takes to be ready."""
    import numpy as np

    from atomas.data.blocks import BlockTable
    from atomas.data.order import GlobalOrder

    blocks = pairs // BLOCK_RECORDS
    generator = np.random.default_rng(0)
    sizes = generator.integers(20_000, 60_000, blocks)
    table = BlockTable(
        suffix="safetensors", first=0, offset=np.cumsum(sizes), bytes=sizes,
        num_records=np.full(blocks, BLOCK_RECORDS, dtype=np.int32), unpacked_bytes=sizes,
        sha256=generator.integers(0, 256, (blocks, 32), dtype=np.uint8),
    )  # fmt: skip
    text = json.dumps(table.to_json(), separators=(",", ":"))
    del table, sizes

    def make_order() -> GlobalOrder:
        eligible = np.ones(blocks * BLOCK_RECORDS, dtype=bool)
        order = GlobalOrder(table.num_records, seed=0, window_blocks=64, eligible=eligible)
        order.indices(len(order) // 2, len(order) // 2 + 4096)
        return order

    table, index_mb, index_seconds = _held(lambda: BlockTable.from_json(json.loads(text)))
    order, order_mb, order_seconds = _held(make_order)
    return {
        "pairs": len(order),
        "blocks": blocks,
        "index_file_mb": len(text) / 1e6,
        "index_mb": index_mb,
        "index_seconds": index_seconds,
        "order_mb": order_mb,
        "order_seconds": order_seconds,
        "lengths_mb": 4 * pairs / 1e6,
    }
