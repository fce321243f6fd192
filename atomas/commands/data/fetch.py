"""`atomas data fetch`: a public data set."""

import argparse
from pathlib import Path
from typing import Any


def register(commands: Any) -> None:
    """Add `atomas data fetch` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "fetch",
        help="download a public data set",
        description="Download the pair files of a public data set: checked, resumable.",
        epilog="Example:  atomas data fetch chebi-20 --out downloads/chebi-20",
    )
    parser.add_argument("dataset", choices=("chebi-20",), help="data set")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--base-url", metavar="URL", help="a mirror: the folder that holds the files")
    parser.set_defaults(run=_fetch)


def _fetch(args: argparse.Namespace) -> None:
    from atomas.data.fetch import DATASETS, fetch

    fetch(DATASETS[args.dataset], args.out, base_url=args.base_url)
