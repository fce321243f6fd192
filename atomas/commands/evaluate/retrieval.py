"""`atomas evaluate retrieval`: the molecule of a text and the text of a molecule."""

import argparse
from pathlib import Path
from typing import Any

from atomas.commands.checks import at_least_one, can_be_written


def register(tasks: Any) -> None:
    """Add `retrieval` to the tasks of `atomas evaluate`."""
    parser: argparse.ArgumentParser = tasks.add_parser(
        "retrieval",
        help="find the molecule of a text and the text of a molecule",
        description="R@1, R@5, R@10, mean reciprocal rank and median rank, both ways. A candidate that is the same\n"
        "molecule or carries the same text counts as right; equal scores count as random order.",
        epilog="Example:\n  atomas evaluate retrieval --checkpoint runs/demo/hierarchical "
        "--data runs/demo/corpus --split test "
        "--report report.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a checkpoint, or a run folder for its newest one"
    )
    parser.add_argument("--best", action="store_true", help="of a run folder take the best checkpoint")
    parser.add_argument("--data", required=True, metavar="DIR", help="a corpus built by `atomas data`")
    parser.add_argument("--split", default="test", help="split of the corpus (default: test)")
    parser.add_argument("--max-pairs", type=int, metavar="N", help="the first N pairs only")
    parser.add_argument(
        "--rerank",
        type=int,
        metavar="N",
        help="the hierarchy orders the N best candidates of each query, with the levels of all sequences kept in files "
        "next to the report meanwhile (default: all pairs in galleries of up to 2,048, else 100)",
    )
    parser.add_argument("--momentum", action="store_true", help="use the momentum copy of the encoder")
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="pairs in one pass (default: 64)"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the numbers as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Evaluate, print the table, write the report."""
    at_least_one(args, "batch_size", "max_pairs", "rerank")
    can_be_written("--report", args.report)

    from atomas.tasks.report import retrieval_report

    retrieval_report(
        checkpoint=Path(args.checkpoint),
        best=args.best,
        data=args.data,
        split=args.split,
        max_pairs=args.max_pairs,
        momentum=args.momentum,
        batch_size=args.batch_size,
        device_name=args.device,
        rerank=args.rerank,
        report=args.report,
    )
