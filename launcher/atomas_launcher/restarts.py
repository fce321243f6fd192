"""Whether a job that failed is started again: a budget, a wait that doubles, and an end where it fails twice alike.

In a job script: `python -m atomas_launcher.restarts --budget N --status CODE --record FILE -- atomas doctor RUN --json`
ends with 0 where the job shall start again. What doctor says of the failure is kept in FILE, a line per failure.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from atomas_launcher.process import RESUME_EXIT_CODE

FIRST_WAIT, LONGEST_WAIT = 5.0, 300.0
"""Seconds before the first restart, and before any."""
_NOT_FAILURES = (0, 2, RESUME_EXIT_CODE, 130, 143)
"""Done, a mistake of the user's, asked to stop, and ended by SIGINT or SIGTERM."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """How an attempt of a run ended."""

    status: int
    """Exit code."""
    step: int | None = None
    """Last step that was done."""
    cause: str = ""
    """As doctor names it; empty where it cannot say."""
    guilty: tuple[int, ...] = ()
    """Ranks that failed first."""
    story: str = ""
    """In one line."""

    def is_like(self, other: "Failure") -> bool:
        """At the same step, of the same cause, by the same ranks; never where the cause is not known."""
        return self.cause != "" and (self.step, self.cause, self.guilty) == (
            other.step,
            other.cause,
            other.guilty,
        )


def is_failure(status: int) -> bool:
    """Whether a job that ended so may want to be started again."""
    return status not in _NOT_FAILURES


def obstacle(failures: Sequence[Failure], budget: int) -> str | None:
    """Why the job is not started again after its last failure; None where it is."""
    last = failures[-1]
    if len(failures) > 1 and last.is_like(failures[-2]):
        return f"it failed twice alike, after step {last.step}: {last.story}"
    if len(failures) > budget:
        return f"it has been restarted {budget} times; the last failure: {last.story or f'exit code {last.status}'}"
    return None


def wait_seconds(failures: int) -> float:
    """How long to wait after so many failures."""
    return min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** (failures - 1))


def diagnose(status: int, doctor: Sequence[str]) -> Failure:
    """What doctor says of the run's newest attempt; only the exit code where it cannot say anything."""
    try:
        done = subprocess.run(doctor, capture_output=True, text=True, check=True, timeout=120)
        found = json.loads(done.stdout)
        return Failure(
            status=status,
            step=found["last_step"],
            cause=found["cause"],
            guilty=tuple(found["guilty"]),
            story=found["story"],
        )
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
        return Failure(status=status)


def main(argv: Sequence[str] | None = None) -> None:
    """Decide for a job script; exit code 0: start it again, 1: do not."""
    parser = argparse.ArgumentParser(prog="python -m atomas_launcher.restarts", description=__doc__)
    parser.add_argument("--budget", type=int, required=True)
    parser.add_argument("--status", type=int, required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("doctor", nargs="+")
    args = parser.parse_args(argv)
    if not is_failure(args.status):
        sys.exit(1)
    with args.record.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(diagnose(args.status, args.doctor))) + "\n")
    lines = args.record.read_text(encoding="utf-8").splitlines()
    failures = [Failure(**{**fields, "guilty": tuple(fields["guilty"])}) for fields in map(json.loads, lines)]
    reason = obstacle(failures, args.budget)
    print(f"not started again: {reason}" if reason else f"failed ({args.status}): started again")
    sys.exit(1 if reason else 0)


if __name__ == "__main__":
    main()
