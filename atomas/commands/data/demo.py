"""`atomas data demo`: pairs made up from the molecules themselves."""

import argparse
from pathlib import Path
from typing import Any


def register(commands: Any) -> None:
    """Add `atomas data demo` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="generate the demo corpus",
        description="Generate a corpus of molecules and descriptions with known fragment-to-phrase links.",
        epilog="Example:  atomas data demo --pairs 10000 --seed 0 --out corpus",
    )
    parser.add_argument("--pairs", type=int, default=10_000, help="molecule-text pairs (default 10000)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same corpus (default 0)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: every core)")
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    from atomas.data.demo import build_demo_corpus
    from atomas.data.report import make_console, print_index
    from atomas.data.shards import Corpus

    build_demo_corpus(args.out, pairs=args.pairs, seed=args.seed, workers=args.workers)
    print_index(make_console(), args.out, Corpus.open(args.out).index)
