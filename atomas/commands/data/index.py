"""`atomas data index`: an index over another project's shards."""

import argparse
from pathlib import Path
from typing import Any

from atomas.commands.checks import at_least_one


def register(commands: Any) -> None:
    """Add `atomas data index` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "index",
        help="read the shards of another project where they lie",
        description=(
            "Write the index of plain WebDataset tars with one sample per key (.smi or .smiles; .txt, .text or "
            ".caption; .json), so that they can be trained on where they lie. Sub-folders are splits; tars in DIR "
            "are `train`. Samples that cannot be used go to DIR/rejected.jsonl."
        ),
        epilog="Example:  atomas data index downloaded/shards && atomas data inspect downloaded/shards",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder with .tar files")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: every core)")
    parser.set_defaults(run=_index)


def _index(args: argparse.Namespace) -> None:
    from atomas.data.plain_shards import REJECTED_NAME, index_shards
    from atomas.data.report import make_console, print_index

    at_least_one(args, "workers")
    index = index_shards(args.directory, workers=args.workers)
    console = make_console()
    print_index(console, args.directory, index)
    if index["counts"]["rejected"]:
        rejected = f"{index['counts']['rejected']:,} samples cannot be used: {args.directory / REJECTED_NAME}"
        console.print(rejected, markup=False)
