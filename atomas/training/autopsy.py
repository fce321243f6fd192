"""What happened to a run that is no longer there, read from the files of one attempt: flights, logs, metrics."""

import json
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from atomas.distributed.flight_recorder import FORMAT
from atomas.errors import AtomasError

_CAUSES = (
    (
        "non-finite",
        r"a loss or gradient that is not finite",
        "look at the batches of those steps (attempts/N/bad_steps); where one rank is always the first, suspect its "
        "device; lower optimizer.learning_rate, or let stability.rollbacks leave that data out",
    ),
    (
        "loss spike",
        r"loss spike",
        "look at the batches of those steps (attempts/N/bad_steps); lower optimizer.learning_rate or "
        "optimizer.gradient_clipping, or allow more stability.rollbacks",
    ),
    (
        "out of memory",
        r"out of memory|OutOfMemory|MemoryError|Cannot allocate memory|ALLOC_FAILED",
        "set training.micro_batch_size, lower data.token_budget, raise deepspeed.zero_stage; "
        "`atomas plan` says what fits",
    ),
    (
        "disk",
        r"No space left|[Qq]uota exceeded|Read-only file system|Input/output error|Stale file handle",
        "free space or mend the file system; the newest complete checkpoint is continued",
    ),
    (
        "silent rank",
        r"has not been seen",
        "the process was killed or stopped, or its host or link is gone: look at the scheduler's record, at `dmesg` of "
        "that host (the kernel kills for memory without a word to us), and at the host itself",
    ),
    (
        "network",
        r"connections broke|[Cc]onnection (closed|reset|refused)|gloo|NCCL",
        "look at the link between the hosts; NCCL_DEBUG=INFO says more",
    ),
    (
        "hang",
        r"have waited|no rank goes on",
        "the flight files of the ranks named show where each of them stood; a slow phase that is no hang needs a "
        "larger run.collective_timeout_seconds",
    ),
    ("data", r", data:", "`atomas data verify` finds damaged shards of a corpus"),
    ("error", r"", "the traceback in the flight file of that rank says where it was raised"),
)
"""Name, how its story is known, what to do; the first that fits counts."""


@dataclass(kw_only=True)
class Autopsy:
    """The end of one attempt."""

    run: str
    attempt: int
    outcome: str
    """done, stopped, failed or unknown"""
    cause: str = ""
    """Of a failure: non-finite, loss spike, out of memory, disk, silent rank, network, hang, data or error"""
    guilty: list[int] = field(default_factory=list)
    """Ranks that failed first, or stayed behind"""
    story: str = ""
    """What happened, in one line"""
    advice: str = ""
    last_step: int | None = None
    """Newest step in the metrics"""
    checkpoint: str | None = None
    """What the next attempt continues"""
    steps_lost: int | None = None
    """Steps after that checkpoint"""
    ranks: dict[int, str] = field(default_factory=dict)
    """Last words of each rank, from its flight file or log"""


def examine(run: Path, attempt: int | None = None) -> Autopsy:
    """Say how an attempt of a run ended, the newest one unless told.

    Raises:
        AtomasError: this is not a run folder, or there is no such attempt.
    """
    folder, number = _attempt(run, attempt)
    flights = dict(_flights(folder))
    logs = {int(path.stem.removeprefix("rank_")): path for path in sorted(folder.glob("rank_*.log"))}
    last_step = _last_step(folder / "metrics.jsonl")
    found = Autopsy(run=str(run), attempt=number, outcome="unknown", last_step=last_step)
    _add_checkpoint(found, run)
    found.ranks = {
        rank: flights[rank]["reason"] if rank in flights else _last_line(logs[rank])
        for rank in sorted({*flights, *logs})
    }
    if flights:
        _explain(found, flights)
    elif last_step is not None and last_step == _max_steps(run):
        found.outcome, found.story = "done", f"all {last_step} steps are done"
    elif 0 in logs and re.search(
        r"stopped (after|before) step", logs[0].read_text(encoding="utf-8", errors="replace")
    ):
        found.outcome, found.story = "stopped", "asked to stop, saved, waits to be started again"
    else:
        found.story = _no_sign_of_an_end(logs.values())
        found.advice = "if it is gone, the scheduler's record says why: time limit, memory, node failure"
    return found


def _explain(found: Autopsy, flights: dict[int, dict[str, Any]]) -> None:
    """The rank that failed by itself knows best; else those who say for whom they waited."""
    found.outcome = "failed"
    own = [rank for rank, flight in flights.items() if rank in flight["guilty"] and flight["traceback"]]
    tellers = own or [rank for rank in flights if flights[rank]["guilty"]] or sorted(flights)
    teller = min(tellers, key=lambda rank: flights[rank]["written"])
    flight = flights[teller]
    found.guilty = own or list(flight["guilty"])
    reason = flight["reason"]
    if "the grace time" in reason:
        found.outcome, found.story = "stopped", reason
        found.advice = "give the scheduler's signal earlier, or save more often (checkpoint.every)"
        return
    found.story = f"rank {teller} ({flight['host']}), {flight['place']}: {reason}" if own else reason
    found.cause, found.advice = next(
        (name, advice) for name, pattern, advice in _CAUSES if re.search(pattern, found.story)
    )


def _attempt(run: Path, attempt: int | None) -> tuple[Path, int]:
    numbers = sorted(int(p.name) for p in (run / "attempts").glob("*") if p.name.isdigit())
    if not numbers:
        raise AtomasError(f"{run} is not the folder of a run: it has no attempts/")
    number = numbers[-1] if attempt is None else attempt
    if number not in numbers:
        raise AtomasError(f"{run} has no attempt {number}, but {', '.join(map(str, numbers))}")
    return run / "attempts" / str(number), number


def _flights(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for path in sorted(folder.glob("flight_rank_*.json")):
        try:
            flight = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AtomasError(f"{path} cannot be read: {error}") from None
        if flight.get("format") != FORMAT:
            raise AtomasError(f"{path} has format {flight.get('format')!r}, not {FORMAT!r}")
        yield flight["rank"], flight


def _last_step(metrics: Path) -> int | None:
    """The newest step in the file; a last line that a kill cut off does not count."""
    if not metrics.is_file():
        return None
    steps = re.findall(
        r'^\{"kind": "train", "step": (\d+).*\}$', metrics.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    return int(steps[-1]) if steps else None


def _max_steps(run: Path) -> int | None:
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return config.get("training", {}).get("max_steps")


def _add_checkpoint(found: Autopsy, run: Path) -> None:
    complete = sorted(run.glob("checkpoints/step_????????/manifest.json"))
    if complete:
        found.checkpoint = complete[-1].parent.name
    if found.last_step is not None:
        saved = int(found.checkpoint.removeprefix("step_")) if found.checkpoint else 0
        found.steps_lost = max(0, found.last_step - saved)


def _no_sign_of_an_end(logs: Iterable[Path]) -> str:
    times = [path.stat().st_mtime for path in logs]
    if not times:
        return "no log was written: the processes ended before the run's folder was open"
    age = max(0.0, time.time() - max(times))
    return f"no sign of an end: it still runs, or all its processes were killed at once; last log line {age:.0f} s ago"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-1] if lines else "(an empty log)"
