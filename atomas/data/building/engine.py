"""The stages of a build, run by datatrove: tasks numbered from 0, a mark for each that is done, Slurm arrays.

datatrove decides which tasks are left, runs one, marks it and submits Slurm arrays. Its local pool is not used: when
the system kills one of its processes, it waits for ever. Here a dead process is an error.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from atomas.data.parallel import available_cores
from atomas.data.progress import Progress
from atomas.errors import AtomasError


class StageError(AtomasError):
    """Not the input is at fault: the same command, run again, goes on with what is done."""


Task = Callable[[int], None]
"""The work of one task, given its number. It may run again after a kill, and must then give the same result."""


@dataclass(frozen=True, kw_only=True)
class Local:
    """Processes of this node; `workers` None: one for every core."""

    workers: int | None = None


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """Arrays of jobs, one task after another in each; `options` go to sbatch (name -> value), before all else."""

    partition: str
    workers: int | None = None
    """Jobs at a time; None: no limit."""
    memory_gb: int = 4
    options: Mapping[str, str] = field(default_factory=dict)


Engine = Local | Slurm

_TASK_TIME = "04:00:00"
"""Of a task in Slurm, unless the options say `time`."""


def run_stage(
    engine: Engine, folder: Path, tasks: int, task: Task, *, label: str, unit: str = "parts"
) -> None:
    """Run `task(0) .. task(tasks - 1)`, but for those that an earlier call with the same `folder` completed.

    Raises what a task raised (Slurm: StageError with its last words), and StageError if a process died.
    """
    if not tasks:
        return
    if isinstance(engine, Local):
        _run_local(folder, tasks, task, engine.workers, label, unit)
    else:
        _run_slurm(folder, tasks, task, engine, label)


def _run_local(folder: Path, tasks: int, task: Task, workers: int | None, label: str, unit: str) -> None:
    executor = _executors().Ranks([partial(_step, task)], folder, tasks)
    missing = executor.get_incomplete_ranks()
    workers = min(workers or available_cores(), len(missing))
    with Progress(label, tasks, unit=unit, initial=tasks - len(missing)) as progress:
        if workers <= 1:
            for rank in missing:
                executor.run_rank(rank)
                progress.update()
            return
        # Forked, because a spawned worker would run the caller's script again. No thread is alive here.
        pool = ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=_ignore_interrupts)
        try:
            for done in as_completed([pool.submit(executor.run_rank, rank) for rank in missing]):
                done.result()
                progress.update()
        except BrokenProcessPool as error:
            raise StageError(
                f"a process died while {label} (out of memory?): run the same command again, with fewer --workers; "
                "the parts that are done are kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _run_slurm(folder: Path, tasks: int, task: Task, engine: Slurm, label: str) -> None:
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        raise AtomasError("--slurm inside a task of a Slurm array: submit from a login node or another job")
    if shutil.which("sbatch") is None:
        raise AtomasError("--slurm: there is no sbatch on this node")
    executor = _executors().Arrays(
        pipeline=[partial(_step, task)],
        tasks=tasks,
        time=_TASK_TIME,
        partition=engine.partition,
        mem_per_cpu_gb=engine.memory_gb,
        workers=engine.workers or -1,
        job_name="atomas-data",
        qos="",
        logging_dir=str(folder),
        sbatch_args={"wait": "", **engine.options},
        requeue_signals=None,
    )
    missing = executor.get_incomplete_ranks()
    if not missing:
        return
    print(f"{label}: {len(missing)} of {tasks} tasks in Slurm", file=sys.stderr)
    failure: Exception | None = None
    try:
        executor.run()
    except subprocess.CalledProcessError as error:
        failure = error
    missing = executor.get_incomplete_ranks()
    if missing:
        raise StageError(
            f"{label}: {len(missing)} of {tasks} Slurm tasks did not finish "
            f"(task {missing[0]}: {_last_words(folder, missing[0]) or failure or 'no log'}); logs in {folder}/logs and "
            f"{folder}/slurm_logs; run the same command again to go on"
        ) from failure


def _last_words(folder: Path, rank: int) -> str:
    """The last line of a task's log, or else of the newest log of a job."""
    logs = sorted((folder / "slurm_logs").glob("*.out"), key=lambda path: path.stat().st_mtime)
    for path in (folder / "logs" / f"task_{rank:05d}.log", *reversed(logs)):
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            found = next((line.strip() for line in reversed(lines) if line.strip()), "")
            if found:
                return found
    return ""


def _step(task: Task, data: Any, rank: int, world_size: int) -> None:
    task(rank)


def _ignore_interrupts() -> None:
    # Ctrl-C reaches the whole process group; only the parent is to react.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _executors() -> Any:
    from atomas.data.building import executors  # datatrove takes half a second

    return executors
