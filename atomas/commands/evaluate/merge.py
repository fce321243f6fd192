"""`atomas evaluate merge`: reports of several seeds into mean and deviation."""

import argparse
from pathlib import Path
from typing import Any

from atomas.commands.checks import can_be_written


def register(tasks: Any) -> None:
    """Add `merge` to the tasks of `atomas evaluate`."""
    parser: argparse.ArgumentParser = tasks.add_parser(
        "merge",
        help="mean and deviation of reports over seeds",
        description="Merge reports of the same evaluation, one for each seed: mean and sample standard deviation\n"
        "of every metric. Reports on other rows, with another tokenizer or decoding are refused.",
        epilog="Example:\n  atomas evaluate merge seed0.json seed1.json seed2.json --out seeds.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT", help="JSON of `atomas evaluate`")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the merged numbers as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Merge, print the table, write the JSON."""
    can_be_written("--out", args.out)

    from atomas.tasks.merge import merge_report_files

    merge_report_files(args.reports, args.out)
