"""Play the faults and write what became of the runs: `python -m tests.faults --json docs/results/faults.json`.

With --only WORDS those whose name holds the words are played, and their rows in the file are replaced.
"""

import argparse
import dataclasses
import json
import platform
import sys
import tempfile
import traceback
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.faults.catalogue import FAULTS
from tests.faults.ground import EVERY, SILENCE, STEPS, Ground
from tests.faults.outcome import CannotPlayError, Fault


def main() -> None:
    """Play, a line per fault; exit code 1 where a run did not go on as it should."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the outcomes go")
    parser.add_argument("--only", default="", metavar="WORDS", help="faults whose name holds these words")
    args = parser.parse_args()
    chosen = [fault for fault in FAULTS if args.only in fault.name]
    rows = _present_rows(args.json)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="atomas-faults-") as folder:
        ground = Ground(Path(folder))
        for number, fault in enumerate(chosen, 1):
            row = _play(fault, ground)
            failed += row["result"] == "failed"
            rows[fault.name] = row
            print(
                f"{number}/{len(chosen)} {fault.name}: {row['result']} {row.get('why', '')}", file=sys.stderr
            )
            _write(args.json, rows)
    sys.exit(1 if failed else 0)


def _play(fault: Fault, ground: Ground) -> dict[str, Any]:
    try:
        outcome = fault.play(ground)
    except CannotPlayError as reason:
        return {"result": "skipped", "why": str(reason)}
    except AssertionError:
        return {"result": "failed", "why": traceback.format_exc()[-3000:]}
    is_good = outcome.deviation == 0 and outcome.steps_lost <= fault.lost
    return {"result": "passed" if is_good else "failed", **dataclasses.asdict(outcome)}


def _present_rows(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    present = json.loads(path.read_text(encoding="utf-8"))["faults"]
    return {fault.name: present[fault.name] for fault in FAULTS if fault.name in present}


def _write(path: Path, rows: dict[str, Any]) -> None:
    report = {
        "command": "python -m tests.faults --json docs/results/faults.json",
        "date": datetime.now(UTC).date().isoformat(),
        "host": f"{platform.machine()}, Python {platform.python_version()}, torch {version('torch')}",
        "ranks": 2,
        "steps": STEPS,
        "checkpoint_every": EVERY,
        "silence_timeout_seconds": SILENCE,
        "faults": {fault.name: rows[fault.name] for fault in FAULTS if fault.name in rows},
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
