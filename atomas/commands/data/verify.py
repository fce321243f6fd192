"""`atomas data verify`: every byte against the index, and repair."""

import argparse
from pathlib import Path
from typing import Any

from atomas.commands.checks import at_least_one
from atomas.errors import AtomasError


def register(commands: Any) -> None:
    """Add `atomas data verify` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "verify",
        help="every byte of a corpus against its index; repair",
        description=(
            "Compare every byte of a corpus (and of its tokens) with its index; damaged shards and samples are named. "
            "With --repair, damaged shards go to DIR/quarantine, their good blocks are written again, and the index "
            "counts what is left."
        ),
        epilog="Example:  atomas data verify corpus --repair",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="a built corpus")
    parser.add_argument("--repair", action="store_true", help="quarantine what is damaged, keep the rest")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: every core)")
    parser.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> None:
    at_least_one(args, "workers")
    from atomas.data.verify import verify_corpus

    report = verify_corpus(args.directory, repair=args.repair, workers=args.workers)
    for fault in report.faults:
        print(fault)
    if report.lost_records is not None:
        print(
            f"{args.directory}: repaired, {report.lost_records:,} of {report.records:,} records are lost; "
            f"what was damaged is in {args.directory}/quarantine"
        )
    elif report.faults:
        raise AtomasError(
            f"{args.directory} is damaged in {len(report.faults)} places: restore the shards, build the corpus again, "
            "or run it with --repair"
        )
    else:
        print(
            f"{args.directory}: {report.shards:,} shards with {report.records:,} records are as they were written"
        )
