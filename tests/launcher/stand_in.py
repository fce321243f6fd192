"""Stands in for `python -m atomas train`: standard library only, so that a launcher's own doings are tested in seconds.

`stand_in.py RUN_DIRECTORY STEPS [MORE...]` takes 0.05 s a step, keeps the step across starts, writes where each rank
stands and what it was given, saves and exits with 75 on SIGTERM, SIGUSR1, SIGHUP or a KILL file, and with 0 when done.
A save takes as many seconds as STAND_IN_SAVES says.
"""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

from atomas_launcher.placement import find_placement


def main() -> int:
    """One rank."""
    run, steps = Path(sys.argv[1]), int(sys.argv[2])
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: received.append(number))
    placement = find_placement()
    attempts = run / "attempts"
    attempts.mkdir(parents=True, exist_ok=True)
    if placement.rank == 0:
        number = 1 + max((int(p.name) for p in attempts.iterdir()), default=0)
        (attempts / str(number)).mkdir()
    found = {**dataclasses.asdict(placement), "arguments": sys.argv[3:], "environment": dict(os.environ)}
    (run / f"rank_{placement.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    print(f"rank {placement.rank} of {placement.world_size}", flush=True)
    state = run / f"step_{placement.rank}"
    step = int(state.read_text(encoding="utf-8")) if state.exists() else 0
    while step < steps:
        time.sleep(0.05)
        step += 1
        state.write_text(str(step), encoding="utf-8")
        if placement.rank == 0:
            with (attempts / str(number) / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step}) + "\n")
        if received or (run / "KILL").exists():
            time.sleep(float(os.environ.get("STAND_IN_SAVES", "0")))
            (run / f"saved_{placement.rank}").touch()
            print(f"rank {placement.rank} saved at step {step}", flush=True)
            return 75
    return 0


if __name__ == "__main__":
    sys.exit(main())
