"""`atomas evaluate grounding`: how often words point at the atoms that they speak of."""

import argparse
from pathlib import Path
from typing import Any

from atomas.commands.checks import at_least_one, can_be_written, is_seed


def register(tasks: Any) -> None:
    """Add `grounding` to the tasks of `atomas evaluate`."""
    parser: argparse.ArgumentParser = tasks.add_parser(
        "grounding",
        help="how often words match the atoms that they describe",
        description="The share of described spans whose best-matching SMILES tokens lie in the right atoms, at every\n"
        "level, beside chance and the same model untrained. Needs a corpus of `atomas data demo`, whose\n"
        "records say which atoms each phrase describes.",
        epilog="Example:\n  atomas evaluate grounding --checkpoint runs/demo/hierarchical --data runs/demo/corpus "
        "--split test --report grounding.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a checkpoint, or a run folder for its newest one"
    )
    parser.add_argument("--best", action="store_true", help="of a run folder take the best checkpoint")
    parser.add_argument("--data", required=True, metavar="DIR", help="a corpus of `atomas data demo`")
    parser.add_argument("--split", default="test", help="split of the corpus (default: test)")
    parser.add_argument("--max-rows", type=int, metavar="N", help="the first N rows only")
    parser.add_argument("--momentum", action="store_true", help="use the momentum copy of the encoder")
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="rows in one pass (default: 32)"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--seed", type=int, default=0, help="of the untrained weights and the bootstrap (default: 0)"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the numbers as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Score, print the table, write the report."""
    at_least_one(args, "batch_size", "max_rows")
    is_seed(args)
    can_be_written("--report", args.report)

    from atomas.tasks.grounding import grounding_report

    grounding_report(
        checkpoint=Path(args.checkpoint),
        best=args.best,
        data=args.data,
        split=args.split,
        max_rows=args.max_rows,
        momentum=args.momentum,
        batch_size=args.batch_size,
        device_name=args.device,
        seed=args.seed,
        report=args.report,
    )
