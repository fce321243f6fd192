"""`atomas bench data`: pairs per second from local disk to batches, beside other libraries."""

import argparse
from pathlib import Path

DESCRIPTION = (
    "From files on local disk to ragged batches of token ids, in one process of one core: pairs already tokenized\n"
    "(`tokens`), and texts that are tokenized on the way (`text`). Every library reads the same pairs from its own\n"
    "format, written beforehand, in an order of its own shuffling, and makes the same batches of them. That each\n"
    "gives exactly the pairs of the corpus with exactly their ids in an epoch is asserted before it is timed. Files\n"
    "are in the page cache. A library that cannot run is a row with its reason. Ours is also timed with one worker\n"
    "process, which says what training pays: the processor time of the training process itself."
)
EXAMPLE = "--corpus corpus --tokenizer t5 --json docs/results/data/throughput.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--corpus", type=Path, metavar="DIR", help="a built corpus (default: a generated one)")
    add("--split", default="train", metavar="NAME", help="of the corpus (default: train)")
    add("--tokenizer", metavar="SPEC", help="a tokenizer's folder or hub name (default: one of the corpus)")
    add(
        "--pairs",
        type=int,
        default=5000,
        metavar="N",
        help="pairs to generate without --corpus (default: 5000)",
    )
    add("--batch", type=int, default=64, metavar="B", help="pairs in a batch (default: 64)")
    add("--seconds", type=float, default=4.0, metavar="S", help="time given to each row (default: 4)")
    add("--rounds", type=int, default=3, metavar="R", help="parts of that time, in turns (default: 3)")
    add("--json", type=Path, metavar="FILE", help="the report, written after every row")


def run(options: argparse.Namespace) -> None:
    """Measure, print and write the report; AtomasError where a library gives other pairs."""
    from atomas.benchmarks.data.measurement import run_benchmark

    run_benchmark(options)
