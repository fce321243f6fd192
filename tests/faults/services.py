"""The same faults under what clusters start jobs with: Slurm, mpirun, DeepSpeed over pdsh, torchrun over ssh."""

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.distributed.cable import ADDRESSES, Cable
from tests.faults.ground import Ground, Run, needs
from tests.faults.outcome import CannotPlayError, Outcome, fault
from tests.faults.ranks import STRIKES_AT, in_short, recovered
from tests.launcher.slurm_cluster import missing_programs, slurm_cluster
from tests.launcher.ssh_hosts import PROGRAMS, ssh_servers

AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


class Cluster:
    """A real Slurm of two nodes, for one job."""

    def __init__(self, environ: dict[str, str]) -> None:
        self.environ = environ

    def __call__(self, *command: str) -> str:
        environ = {**os.environ, **self.environ}
        return subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout

    def job(self, run: Run) -> str:
        """The number of the job that a launch has submitted."""
        run.ends(0)
        found = re.search(r"submitted slurm-(\d+)", run.text())
        assert found is not None, run.text()
        return found.group(1)

    def state(self, job: str) -> str:
        """State and reason; the state alone once it has ended."""
        facts = dict(
            word.split("=", 1) for word in self("scontrol", "-o", "show", "job", job).split() if "=" in word
        )
        return f"{facts['JobState']} {facts['Reason']}"


@contextlib.contextmanager
def slurm() -> Iterator[Cluster]:
    missing = missing_programs()
    if missing:
        raise CannotPlayError(f"needs {', '.join(missing)} on this host")
    with slurm_cluster() as environ:
        yield Cluster(environ)


SLURM = ("--nodes=2", "--gpus-per-node=1")
SLURM_PROFILE = "backend: slurm\nwarning_seconds: 60\n"


@fault("Slurm warns before the time limit (SIGUSR1)", lost=0)
def slurm_warning(ground: Ground) -> Outcome:
    with (
        slurm() as cluster,
        ground.run("warned", *SLURM, profile=SLURM_PROFILE, environ=cluster.environ) as run,
    ):
        job = cluster.job(run)
        run.until(lambda: len(run.steps()) >= 2, "two steps")
        cluster("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@60 does
        struck = time.time()
        detected = run.until(lambda: "BeginTime" in cluster.state(job), "the job is requeued")
        cluster("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm waits two minutes otherwise
        resumed = run.trains(2)
        run.until(lambda: "COMPLETED" in cluster.state(job), "the end of the job")
        return run.outcome(
            happened="saved after the step in flight, and requeued under the same number", start="Slurm, 2 nodes",
            again="the job itself", struck=struck, detected=detected, resumed=resumed,
        )  # fmt: skip


@fault("scancel", lost=0)
def slurm_cancel(ground: Ground) -> Outcome:
    with slurm() as cluster:
        options = {"profile": SLURM_PROFILE, "environ": cluster.environ}
        with ground.run("cancelled", *SLURM, **options) as run:  # type: ignore[arg-type]
            job = cluster.job(run)
            run.until(lambda: len(run.steps()) >= 2, "two steps")
            cluster("scancel", job)
            struck = time.time()
            detected = run.until(lambda: "CANCELLED" in cluster.state(job), "the job is cancelled")
            run.until(lambda: "stopped after step" in run.log(), "the run has saved")
        with ground.run("cancelled", *SLURM, **options) as again:  # type: ignore[arg-type]
            job = cluster.job(again)
            resumed = again.trains(2)
            again.until(lambda: "COMPLETED" in cluster.state(job), "the end of the job")
            return again.outcome(
                happened="saved after the step in flight; the job is CANCELLED and not requeued",
                start="Slurm, 2 nodes", again="the same command", struck=struck, detected=detected,
                by_hand=again.started, resumed=resumed,
            )  # fmt: skip


@fault("kill -9 of rank 1 under Slurm")
def slurm_kill(ground: Ground) -> Outcome:
    options = (*SLURM, "--restarts=1")
    with slurm() as cluster, ground.run(
        "slurm_kill", *options, profile=SLURM_PROFILE, environ=cluster.environ, fault=f"kill 1 {STRIKES_AT}"
    ) as run:  # fmt: skip
        job = cluster.job(run)
        struck = run.struck()
        detected = run.until(lambda: "BeginTime" in cluster.state(job), "the job is requeued")
        cluster("scontrol", "update", f"JobId={job}", "StartTime=now")
        resumed = run.trains(2)
        run.until(lambda: "COMPLETED" in cluster.state(job), "the end of the job")
        return run.outcome(
            happened=in_short(run.story()), start="Slurm, 2 nodes", again="the job itself",
            struck=struck, detected=detected, resumed=resumed,
        )  # fmt: skip


def under_mpi(ground: Ground, name: str, profile: str, start: str) -> Outcome:
    """A rank that mpirun has started is killed."""
    environ = {**AS_ROOT, "OMPI_MCA_rmaps_base_oversubscribe": "1"}
    options = ("--gpus-per-node=2", "--restarts=1")
    strike = f"kill 1 {STRIKES_AT}"
    with ground.run(name, *options, profile=f"backend: mpi\n{profile}", environ=environ, fault=strike) as run:
        return recovered(run, run.struck(), start=start)


@fault("kill -9 of rank 1 under mpirun (Open MPI)")
def openmpi_kill(ground: Ground) -> Outcome:
    needs("mpirun")
    if "Open MPI" not in subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout:
        raise CannotPlayError("needs Open MPI: the mpirun of this host is another")
    return under_mpi(ground, "openmpi", "mpi: openmpi\n", "mpirun of Open MPI")


@contextlib.contextmanager
def two_hosts(ground: Ground, name: str) -> Iterator[tuple[Cable, str]]:
    """Two network namespaces with an sshd in each; yields the cable, and lines of a profile."""
    needs("ip", "unshare", *PROGRAMS)
    cable = Cable()
    try:
        cable.build()
        with ssh_servers(ground.folder / f"{name}.ssh", [[a] for a in ADDRESSES], cable.prefixes()) as client:
            yield cable, f"hosts: [{', '.join(ADDRESSES)}]\nssh_options: {json.dumps(client)}\n"
    except subprocess.CalledProcessError as error:
        raise CannotPlayError(f"network namespaces cannot be made here: {error}") from None
    finally:
        cable.remove()


@fault("kill -9 of rank 1, on the other host, under deepspeed over pdsh")
def deepspeed_kill(ground: Ground) -> Outcome:
    needs("pdsh")
    with two_hosts(ground, "pdsh") as (cable, hosts), ground.run(
        "pdsh", *SLURM, "--restarts=1", profile=f"backend: deepspeed\n{hosts}", fault=f"kill 1 {STRIKES_AT}",
        prefix=cable.prefixes()[0],
    ) as run:  # fmt: skip
        return recovered(run, run.struck(), start="deepspeed, pdsh over ssh, 2 network namespaces")


@fault("the link between two hosts cut")
def cut_link(ground: Ground) -> Outcome:
    """It is mended when the run has noticed."""
    with two_hosts(ground, "cut") as (cable, hosts), ground.run(
        "cut", *SLURM, "--restarts=3", profile=f"backend: torchrun\nrendezvous: static\n{hosts}",
        fault=f"stop 1 {STRIKES_AT}", prefix=cable.prefixes()[0],
    ) as run:  # fmt: skip
        run.struck()  # rank 1 stands still before its fourth step, so that the link is cut in it
        (stopped,) = _stopped(run.folder.parent)
        cable.cut()
        struck = time.time()
        os.kill(stopped, 18)
        detected = run.says("; started again in")
        cable.mend()
        resumed = run.trains(2)
        run.ends(0)
        return run.outcome(
            happened=in_short(run.story()), start="torchrun over ssh, 2 network namespaces",
            again="the launcher, when the link was mended", struck=struck, detected=detected, resumed=resumed,
        )  # fmt: skip


def _stopped(runs: Path) -> list[int]:
    """Processes of these runs that have been stopped by a signal."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_ours = str(runs).encode() in (path / "cmdline").read_bytes()
            state = (path / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
            found += [int(path.name)] if is_ours and state == "T" else []
    return found
