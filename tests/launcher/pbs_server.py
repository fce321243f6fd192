"""Stands in for a PBS server: qsub, qstat and qdel with what a job script of ours can see of the real ones.

`pbs_server.py FOLDER qsub|qstat|qdel ARGUMENTS...`; jobs are folders in FOLDER. A job runs at once, on this host, with
PBS_JOBID and a PBS_NODEFILE of as many lines as its select asks for; #PBS lines are read as PBS does, and an unknown
one is refused.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

OPTIONS = re.compile(r"-N [A-Za-z][\w-]{0,14}|-l \S+|-r [yn]|-j (oe|eo|n)|-q \S+|-A \S+|-o \S+")

KEPT = ("HOME", "LANG", "LOGNAME", "PATH", "SHELL", "TZ")
"""All that qsub takes along of its environment without -V."""


def qsub(folder: Path, script: str) -> int:
    """Start a job and print its number."""
    text = Path(script).read_text(encoding="utf-8")
    options = re.findall(r"^#PBS (.*)$", text, flags=re.MULTILINE)
    wrong = [option for option in options if not OPTIONS.fullmatch(option)]
    select = re.search(r"select=(\d+):ncpus=(\d+):mpiprocs=(\d+)", text)
    if wrong or select is None:
        print(f"qsub: illegal option {wrong}", file=sys.stderr)
        return 1
    number = f"{1 + len(list(folder.iterdir()))}.stand-in"
    job = folder / number
    job.mkdir()
    (job / "nodes").write_text("localhost\n" * int(select[1]) * int(select[3]), encoding="utf-8")
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    environ = {**kept, "PBS_JOBID": number, "PBS_NODEFILE": str(job / "nodes")}
    # the shell keeps the exit code when the script has gone
    keep = 'bash "$1" & echo $! >"$2/pid"; wait $!; echo $? >"$2/status"'
    subprocess.Popen(
        ["bash", "-c", keep, "keep", script, str(job)], env=environ, cwd=Path.home(), stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    print(number)
    return 0


def qstat(folder: Path, *arguments: str) -> int:
    """Print state and exit code, as `qstat -x -f` does."""
    job = folder / arguments[-1]
    if not job.is_dir():
        print(f"qstat: Unknown Job Id {arguments[-1]}", file=sys.stderr)
        return 153
    ended = job / "status"
    status = f"    Exit_status = {ended.read_text(encoding='utf-8').strip()}\n" if ended.exists() else ""
    print(f"Job Id: {job.name}\n    job_state = {'F' if status else 'R'}\n{status}")
    return 0


def qdel(folder: Path, number: str) -> int:
    """SIGTERM to the job's script, as PBS sends it before SIGKILL."""
    os.kill(int((folder / number / "pid").read_text(encoding="utf-8")), signal.SIGTERM)
    return 0


if __name__ == "__main__":
    where = Path(sys.argv[1])
    sys.exit({"qsub": qsub, "qstat": qstat, "qdel": qdel}[sys.argv[2]](where, *sys.argv[3:]))
