"""`atomas evaluate predictions`: the metrics of outputs that are already in a file."""

import argparse
from pathlib import Path
from typing import Any

from atomas.commands.checks import at_least_one, can_be_written, is_seed
from atomas.errors import AtomasError


def register(tasks: Any) -> None:
    """Add `predictions` to the tasks of `atomas evaluate`."""
    parser: argparse.ArgumentParser = tasks.add_parser(
        "predictions",
        help="score a file of captions or molecules",
        description="Score a TSV of predictions by the protocol of MolT5's evaluation scripts, with bootstrap\n"
        "intervals. The header names three columns: SMILES, ground truth, output for captions;\n"
        "description, ground truth, output for molecules. What cannot be computed is null with a reason.",
        epilog="Example:\n  atomas evaluate predictions captions.txt --task caption "
        "--tokenizer scibert_scivocab_uncased --report report.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="tab-separated predictions with a header")
    parser.add_argument("--task", required=True, choices=("caption", "molecule"), dest="kind")
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="of caption BLEU and METEOR: a folder or hub name (default: SciBERT from "
        "$ATOMAS_SHARED/data/tokenizers or the hub's cache; without it BLEU is null)",
    )
    parser.add_argument(
        "--resamples", type=int, default=1000, metavar="N", help="of the bootstrap (default: 1000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: every core)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the numbers as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Score, print the table, write the report."""
    at_least_one(args, "resamples", "workers")
    is_seed(args)
    can_be_written("--report", args.report)
    if args.tokenizer is not None and args.kind == "molecule":
        raise AtomasError("--tokenizer is for --task caption: molecules are compared by characters")

    from atomas.data.parallel import available_cores
    from atomas.metrics.resampling import Bootstrap
    from atomas.tasks.predictions import predictions_report

    predictions_report(
        args.file,
        task=args.kind,
        tokenizer=args.tokenizer,
        bootstrap=Bootstrap(resamples=args.resamples, seed=args.seed),
        workers=available_cores() if args.workers is None else args.workers,
        report=args.report,
    )
