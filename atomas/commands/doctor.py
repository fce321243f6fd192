"""`atomas doctor RUN`: what happened to a run that ended."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atomas.training.autopsy import Autopsy


def register(subparsers: Any) -> None:
    """Add `atomas doctor` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor",
        help="say what happened to a run that ended",
        description="Read the flight files, logs and metrics of a run and say how it ended: which rank first, at which "
        "step, and whether memory, disk, data, network, a hang or an error was the cause.",
        epilog="Example: atomas doctor runs/mine",
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--attempt", type=int, metavar="N", help="the attempt, instead of the newest")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from atomas.training.autopsy import examine

    found = examine(args.run_folder, args.attempt)
    print(json.dumps(asdict(found), indent=1) if args.json else _told(found))


def _told(found: "Autopsy") -> str:
    cause = f" ({found.cause})" if found.cause else ""
    lines = [f"{found.run}, attempt {found.attempt}: {found.outcome}{cause}", f"  {found.story}"]
    if found.advice:
        lines.append(f"  {found.advice}")
    if found.last_step is not None:
        source = found.checkpoint or "the start"
        lines.append(
            f"  last step {found.last_step}; the next attempt continues {source}, steps lost: {found.steps_lost}"
        )
    if found.outcome in ("failed", "unknown"):
        lines += [f"  rank {rank}: {words}" for rank, words in found.ranks.items()]
    return "\n".join(lines)
