"""`atomas report`: a run on one page."""

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    """Add `atomas report` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "report",
        help="losses, recall, speed and the split of the step time of a run, on one page",
        description="Draw what a run has written to metrics.jsonl, finished or not, all attempts together: one HTML\n"
        "file that needs no other.",
        epilog="Example: atomas report runs/mine",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="RUN", help="the folder of a run")
    parser.add_argument("--out", metavar="FILE", help="default: RUN/report.html")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    import json
    from pathlib import Path

    from atomas.errors import AtomasError
    from atomas.training.telemetry import read_metrics
    from atomas.viz.run_report import write_run_report

    folder = Path(args.folder)
    records = read_metrics(folder)
    if not any(record["kind"] == "train" and "mfu" in record for record in records):
        raise AtomasError(
            f"{folder} has no metrics of a step, or those of an older Atomas: give the folder of a run, as runs/mine"
        )
    newest = max((folder / "attempts").glob("*/env.json"), key=lambda path: int(path.parent.name))
    environment = json.loads(newest.read_text(encoding="utf-8"))
    out = Path(args.out) if args.out else folder / "report.html"
    write_run_report(records, environment, out, title=folder.resolve().name)
    print(out)
