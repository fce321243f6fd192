"""`atomas data leakage`: rows of evaluation sets that a corpus holds."""

import argparse
from pathlib import Path
from typing import Any

from atomas.commands.checks import at_least_one


def register(commands: Any) -> None:
    """Add `atomas data leakage` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "leakage",
        help="which rows of evaluation sets are in a corpus",
        description=(
            "Report which rows of evaluation sets are in a training corpus: by molecule, by skeleton (InChIKey's first "
            "block) and by text. `atomas data build --exclude` leaves them out."
        ),
        epilog="Example:  atomas data leakage corpus --against chebi20/test.txt pcdes:test --rows leaks.jsonl",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="a built corpus")
    parser.add_argument(
        "--against",
        nargs="+",
        required=True,
        metavar="SET",
        help="pair files, corpora, or DIR:SPLIT of a corpus",
    )
    parser.add_argument(
        "--split", default="train", metavar="NAME", help="split of the corpus (default train)"
    )
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="write every leaked row to this file (JSON lines)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts to this file")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: every core)")
    parser.set_defaults(run=_leakage)


def _leakage(args: argparse.Namespace) -> None:
    at_least_one(args, "workers")
    from atomas.data.leakage import write_report

    write_report(
        args.directory, args.against, split=args.split, rows=args.rows, counts=args.json, workers=args.workers
    )
