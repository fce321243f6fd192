"""`atomas evaluate`: measure a checkpoint."""

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    """Add `atomas evaluate` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "evaluate", help="measure a checkpoint", description="Measure a checkpoint on a split of a corpus."
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    retrieval = tasks.add_parser(
        "retrieval",
        help="find the molecule of a text and the text of a molecule",
        description="R@1, R@5, R@10, mean reciprocal rank and median rank, both ways. A candidate that is the same\n"
        "molecule or carries the same text counts as right; equal scores count as random order.",
        epilog="Example:\n  atomas evaluate retrieval --checkpoint runs/demo/hierarchical "
        "--data runs/demo/corpus --split test "
        "--report report.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    retrieval.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a checkpoint, or a run folder for its newest one"
    )
    retrieval.add_argument("--best", action="store_true", help="of a run folder take the best checkpoint")
    retrieval.add_argument("--data", required=True, metavar="DIR", help="a corpus built by `atomas data`")
    retrieval.add_argument("--split", default="test", help="split of the corpus (default: test)")
    retrieval.add_argument("--max-pairs", type=int, metavar="N", help="the first N pairs only")
    retrieval.add_argument("--momentum", action="store_true", help="use the momentum copy of the encoder")
    retrieval.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="pairs in one pass (default: 64)"
    )
    retrieval.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    retrieval.add_argument("--report", metavar="FILE", help="write the numbers as JSON")
    retrieval.set_defaults(run=_retrieval)


def _retrieval(args: argparse.Namespace) -> None:
    from pathlib import Path

    from atomas.tasks.report import retrieval_report

    retrieval_report(
        checkpoint=Path(args.checkpoint),
        best=args.best,
        data=Path(args.data),
        split=args.split,
        max_pairs=args.max_pairs,
        momentum=args.momentum,
        batch_size=args.batch_size,
        device_name=args.device,
        report=None if args.report is None else Path(args.report),
    )
