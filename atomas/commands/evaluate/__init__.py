"""`atomas evaluate`: measure a checkpoint or a file of predictions; each task is a module here."""

import argparse
import importlib
from typing import Any

TASKS = ("retrieval", "generation", "predictions", "merge", "grounding")


def register(subparsers: Any) -> None:
    """Add `atomas evaluate` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "evaluate",
        help="measure a checkpoint or predictions",
        description="Measure a checkpoint on a split of a corpus, or predictions that are already there.",
        epilog="Example: atomas evaluate retrieval --checkpoint runs/demo --data corpus --split test",
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name in TASKS:
        importlib.import_module(f"atomas.commands.evaluate.{name}").register(tasks)
