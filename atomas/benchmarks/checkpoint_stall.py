"""How long training waits for a checkpoint, written beside it and waited for: two real runs of one rank.

    python -m atomas.benchmarks.checkpoint_stall --corpus corpus --json docs/results/checkpoint_stall.json

The runs differ in `checkpoint.asynchronous` alone. The first checkpoint, for which the host memory of the copies is
taken, and the last one, which is always waited for, are left out. `load` is what the machine had to do at the end of a
run, this run included: where it is over the number of cores, read seconds as ratios.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

STEPS, EVERY = 13, 3
OPTIONS = (
    "--model.d_model=320", "--model.d_kv=64", "--model.d_ff=1280", "--model.num_layers=4",
    "--model.num_decoder_layers=3", "--model.num_heads=5", "--data.batch_size=4", "--momentum.queue_size=64",
    "--run.device=cpu", "--run.threads=1", "--evaluation.every=0", f"--training.max_steps={STEPS}",
    f"--checkpoint.every={EVERY}", "--training.log_every=100",
)  # fmt: skip


def main() -> None:
    """Run both and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True, metavar="FOLDER", help="a corpus")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="the report")
    args = parser.parse_args()
    rows = []
    for asynchronous in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "atomas", "train", f"--data.corpus={args.corpus}", *OPTIONS]
            command += [f"--run.output_dir={folder}", "--run.name=run"]
            command += [f"--checkpoint.asynchronous={str(asynchronous).lower()}"]
            subprocess.run(command, check=True)
            load = os.getloadavg()[0]
            rows.append({"asynchronous": asynchronous, "load": load, **_row(Path(folder) / "run")})
        print(json.dumps(rows[-1]), flush=True)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    report = {"benchmark": "checkpoint-stall", "ranks": 1, "torch": torch.__version__, "rows": rows}
    args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _row(run: Path) -> dict[str, Any]:
    lines = (run / "attempts/1/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    saves = [record for record in records if record["kind"] == "checkpoint"][1:-1]
    beside: set[int] = set()
    done = 0
    for record in records:  # in the order of time
        if record["kind"] == "train":
            done = record["step"]
        elif record["kind"] == "checkpoint":
            beside |= set(range(record["step"] + 1, done + 1))
    seconds = {r["step"]: r["step_seconds"] for r in records if r["kind"] == "train" and r["step"] > 1}
    newest = sorted((run / "checkpoints").glob("step_????????"))[-1]
    slower = [value for step, value in seconds.items() if step in beside]
    return {
        "checkpoint_bytes": sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()),
        "stalled_seconds": statistics.median(save["stalled_seconds"] for save in saves),
        "published_after_seconds": statistics.median(save["seconds"] for save in saves),
        "step_seconds": statistics.median(value for step, value in seconds.items() if step not in beside),
        "step_seconds_beside": statistics.median(slower) if slower else None,
        "steps_beside": len(slower),
    }


if __name__ == "__main__":
    main()
