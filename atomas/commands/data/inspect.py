"""`atomas data inspect`: what is in a corpus."""

import argparse
from typing import Any

from atomas.errors import AtomasError


def register(commands: Any) -> None:
    """Add `atomas data inspect` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="counts, lengths, hazards and some records of a corpus",
        description="Read a whole corpus, verify its checksums, and show what is in it.",
        epilog="Example:  atomas data inspect corpus --tokenizer t5 --samples 3",
    )
    parser.add_argument("corpus", metavar="CORPUS", help="its folder, or its http(s):// or s3:// address")
    parser.add_argument(
        "--tokenizer", metavar="SPEC", help="count tokens as well: a tokenizer's folder or hub name"
    )
    parser.add_argument(
        "--samples", type=int, default=3, metavar="N", help="records shown a split (default 3)"
    )
    for name, default, help_text in (
        ("--seed", 0, "run.seed of the order whose shuffling is measured"),
        ("--window-blocks", 64, "its data.window_blocks"),
        ("--group-shards", 64, "its data.group_shards"),
    ):
        parser.add_argument(
            name, type=int, default=default, metavar="N", help=f"{help_text} (default {default})"
        )
    parser.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> None:
    from atomas.data.inspect import OrderOptions, inspect_corpus

    if args.window_blocks < 1 or args.group_shards < 1:
        raise AtomasError("--window-blocks and --group-shards: at least 1 is needed")
    order = OrderOptions(seed=args.seed, window_blocks=args.window_blocks, group_shards=args.group_shards)
    inspect_corpus(args.corpus, tokenizer=args.tokenizer, samples=args.samples, order=order)
