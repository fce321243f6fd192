"""`atomas doctor`: whether a job can run here; `atomas doctor RUN`: what happened to a run that ended."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atomas.training.autopsy import Autopsy


def register(subparsers: Any) -> None:
    """Add `atomas doctor` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor",
        help="say whether a job can run here, or what happened to a run that ended",
        description="Without RUN: check this node, or with --distributed all nodes of an allocation together, before a "
        "job starts; exit code 0 go, 1 no-go. With RUN: read the flight files, logs and metrics of a run and say how "
        "it ended: which rank first, at which step, and whether memory, disk, data, network, a hang or an error was "
        "the cause.",
        epilog="Examples:\n  atomas doctor --folder /shared/runs --corpus corpus\n"
        "  atomas launch --cluster slurm-generic --nodes 4 -- doctor --distributed\n  atomas doctor runs/mine",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", nargs="?", type=Path, metavar="RUN", help="folder of a run that ended")
    parser.add_argument(
        "--distributed", action="store_true", help="check all nodes together; start it on every rank"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="where runs will be written (default: runs)",
    )
    parser.add_argument(
        "--corpus", metavar="CORPUS", help="check that this folder or address of a corpus can be read"
    )
    parser.add_argument("--attempt", type=int, metavar="N", help="the attempt, instead of the newest")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.run_folder is None:
        sys.exit(_check(args))
    _examine(args)


def _check(args: argparse.Namespace) -> int:
    from atomas.diagnosis.result import as_json, is_go, print_table

    if args.distributed:
        from atomas.diagnosis.network import check_all_nodes

        results, is_rank_zero = check_all_nodes(args.folder, args.corpus)
    else:
        from atomas.diagnosis.node import node_checks

        results, is_rank_zero = node_checks(args.folder, args.corpus), True
    if is_rank_zero and args.json:
        print(as_json(results))
    elif is_rank_zero:
        print_table(results)
    return 0 if is_go(results) else 1


def _examine(args: argparse.Namespace) -> None:
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
