"""What `atomas launch` remembers of a job, and how its state, its logs and its end are asked for.

One JSON file per job in ~/.local/state/atomas/jobs, so that `status`, `logs` and `cancel` work from any folder.
"""

import dataclasses
import json
import os
import socket
import subprocess
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from atomas_launcher.errors import LaunchError
from atomas_launcher.process import RESUME_EXIT_CODE

SCHEDULERS = ("slurm", "pbs", "kubernetes")
"""Back ends whose jobs go on without the command that started them."""


@dataclasses.dataclass(kw_only=True)
class JobRecord:
    """One start of one job."""

    id: str
    """BACKEND-NUMBER; `status`, `logs` and `cancel` also take the scheduler's number or the job's name."""
    backend: str
    name: str
    folder: str
    """Files of this start."""
    run_directory: str | None
    submitted: str
    """ISO 8601, local time."""
    scheduler_id: str = ""
    """Slurm's or PBS's number, or Kubernetes' TYPE/NAME."""
    namespace: str = ""
    """Of Kubernetes."""
    host: str = ""
    """Where the processes were started, without a scheduler."""
    pid: int = 0
    start_ticks: int = 0
    """When that process began, so that another one with its number is not taken for it."""
    exit_code: int | None = None


def write_record(record: JobRecord) -> None:
    """Write a job's file; a reader sees the old one or the new one."""
    folder = _state_folder()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{record.id}.tmp"
    temporary.write_text(json.dumps(dataclasses.asdict(record), indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / f"{record.id}.json")


def all_records() -> list[JobRecord]:
    """Every job that is remembered, oldest first."""
    records = []
    for path in _state_folder().glob("*.json"):
        try:
            records.append(JobRecord(**json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError):
            continue  # of another version
    return sorted(records, key=lambda record: record.submitted)


def find_record(job: str) -> JobRecord:
    """A job by its id, its scheduler's number, or its name (the newest of that name).

    Raises:
        LaunchError: there is none.
    """
    for record in reversed(all_records()):
        if job in (record.id, record.scheduler_id, record.name):
            return record
    known = ", ".join(record.id for record in all_records()[-5:])
    raise LaunchError(f"no job {job!r}; the newest are: {known or 'none'} (`atomas launch status` lists all)")


def state(record: JobRecord) -> str:
    """What the scheduler, or this host, says of a job now, in one line."""
    if record.backend == "slurm":
        return _slurm_state(record)
    if record.backend == "pbs":
        answer = _ask("qstat", "-x", "-f", record.scheduler_id)
        lines = [line.strip() for line in (answer or "").splitlines()]
        told = [line for line in lines if line.startswith(("job_state", "exec_host", "Exit_status"))]
        return "; ".join(told) or "not known to PBS"
    if record.backend == "kubernetes":
        conditions = "jsonpath={range .status.conditions[*]}{.type}={.status} {end}"
        answer = _ask(
            "kubectl", "get", record.scheduler_id, f"--namespace={record.namespace}", "-o", conditions
        )
        return "not known to Kubernetes" if answer is None else answer.strip() or "waiting"
    if record.exit_code is not None:
        return _ended(record.exit_code)
    if record.host != socket.gethostname():
        return f"started on {record.host}; ask there"
    if start_ticks(record.pid) == record.start_ticks:
        return f"running, process {record.pid}"
    return "ended without a word: its launcher was killed"


def progress(record: JobRecord) -> str:
    """The last step that the run has written, or nothing."""
    attempt = _newest_attempt(record)
    if attempt is None or not (attempt / "metrics.jsonl").is_file():
        return ""
    for line in reversed(_last_lines(attempt / "metrics.jsonl", 20)):
        try:
            written = json.loads(line)
        except ValueError:
            continue  # half written
        if written.get("kind") != "checkpoint":  # of a step that may be long ago
            return f"attempt {attempt.name}, step {written.get('step')}"
    return ""


def log_lines(record: JobRecord, rank: int | None, count: int) -> list[str]:
    """The last lines of one rank's log, or of the job's own output and rank 0's log.

    Raises:
        LaunchError: there is nothing yet.
    """
    if record.backend == "kubernetes" and rank is None:
        kind, _, name = record.scheduler_id.partition("/")
        label = (
            "jobset.sigs.k8s.io/jobset-name"
            if kind.startswith("trainjob")
            else "training.kubeflow.org/job-name"
        )
        answer = _ask(
            "kubectl", "logs", f"--selector={label}={name}", f"--namespace={record.namespace}", "--prefix",
            f"--tail={count}",
        )  # fmt: skip
        return (answer or "no answer from Kubernetes").splitlines()
    files = [] if rank is not None else sorted(Path(record.folder).glob("*.out"))
    attempt = _newest_attempt(record)
    if attempt is not None:
        log = attempt / f"rank_{rank or 0:04d}.log"
        files += [log] if log.is_file() else []
    if not files:
        where = attempt or record.run_directory or record.folder
        raise LaunchError(f"{record.id} has written nothing to {where} yet; it is {state(record)}")
    lines = []
    for file in files:
        lines += [f"==> {file} <==", *_last_lines(file, count)]
    return lines


def cancel(record: JobRecord) -> str:
    """Ask the scheduler to end a job, or the run to save and stop; what was done, in one line.

    Raises:
        LaunchError: the scheduler refuses, or there is nothing that would hear it.
    """
    commands: dict[str, tuple[str, ...]] = {
        "slurm": ("scancel", record.scheduler_id),
        "pbs": ("qdel", record.scheduler_id),
        "kubernetes": ("kubectl", "delete", record.scheduler_id, f"--namespace={record.namespace}"),
    }
    if record.backend in commands:
        command = commands[record.backend]
        if _ask(*command) is None:
            raise LaunchError(f"{command[0]} refused: {record.id} is {state(record)}")
        return f"asked {command[0]} to end {record.id}"
    if record.exit_code is not None:
        return f"{record.id} has {_ended(record.exit_code)}"
    if record.run_directory is None or not Path(record.run_directory).is_dir():
        raise LaunchError(f"{record.id} has no run folder; end process {record.pid} on {record.host} instead")
    kill = Path(record.run_directory) / "KILL"
    kill.touch()
    return f"made {kill}: the run saves after the step in flight and stops; remove the file to go on later"


def start_ticks(pid: int) -> int:
    """When a process of this host began, in clock ticks since boot; 0 where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[19])  # proc(5): field 22, the name before it may hold blanks


def _slurm_state(record: JobRecord) -> str:
    # %T state, %r why it waits, %N where it runs, %M for how long
    queue = _ask("squeue", "--noheader", f"--jobs={record.scheduler_id}", "--format=%T (%r) %N %M")
    if queue and queue.strip():
        return "; ".join(" ".join(line.split()) for line in queue.splitlines())
    answer = _ask("scontrol", "--oneliner", "show", "job", record.scheduler_id)
    facts = dict(word.split("=", 1) for word in (answer or "").split() if "=" in word)
    if "JobState" in facts:
        return f"{facts['JobState']}, exit code {facts.get('ExitCode', '?')}"
    return "no longer known to Slurm: it has ended"


def _ended(code: int) -> str:
    meaning = {0: " (done)", RESUME_EXIT_CODE: " (saved; start it again to continue)"}.get(code, "")
    return f"ended with exit code {code}{meaning}"


def _ask(*command: str) -> str | None:
    """What a scheduler answers; None where it refuses or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout


def _newest_attempt(record: JobRecord) -> Path | None:
    folder = Path(record.run_directory or os.devnull) / "attempts"
    numbers = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    return folder / str(max(numbers)) if numbers else None


def _last_lines(file: Path, count: int) -> Sequence[str]:
    with file.open(encoding="utf-8", errors="replace") as lines:
        return [line.rstrip("\n") for line in deque(lines, maxlen=count)]


def _state_folder() -> Path:
    configured = os.environ.get("XDG_STATE_HOME")
    return (Path(configured) if configured else Path.home() / ".local" / "state") / "atomas" / "jobs"
