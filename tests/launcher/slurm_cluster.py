"""A real Slurm of two nodes on this host, in one temporary folder, for as long as a `with` block."""

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

NODES = "127.0.0.[1-2]"
"""Node names that every host can resolve, in Slurm's compressed form as on a real cluster."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "salloc", "sinfo", "squeue", "scancel")

_CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
# the nodes below count more cores than the host may have
SlurmdParameters=config_overrides
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first_port} CPUs=4
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second_port} CPUs=4
PartitionName=all Nodes={nodes} Default=YES State=UP
"""


def missing_programs() -> list[str]:
    """What a cluster needs and this host lacks."""
    return [program for program in PROGRAMS if _find(program) is None]


@contextlib.contextmanager
def slurm_cluster() -> Iterator[dict[str, str]]:
    """Start munged, slurmctld and two slurmd; yield the variables that point `srun` at them; end all four."""
    # Not pytest's folder: a socket's path is limited to 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o711)
    daemons: list[subprocess.Popen[bytes]] = []
    environ = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(program: str, *arguments: str) -> None:
        with (folder / f"{len(daemons)}-{program}.out").open("wb") as output:
            daemons.append(
                subprocess.Popen(
                    [_find(program) or program, *arguments], env=environ, stdout=output, stderr=output
                )
            )

    try:
        _configure(folder)
        start(
            "munged", "--foreground", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key",
            f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed",
            "--num-threads=1",
        )  # fmt: skip
        _wait_until((folder / "munge.socket").exists, "munged", folder)
        start("slurmctld", "-D")
        for node in ("127.0.0.1", "127.0.0.2"):
            start("slurmd", "-D", "-N", node)
        _wait_until(
            lambda: _output(["sinfo", "--noheader", "--Node", "--format=%t"], environ) == ["idle", "idle"],
            "two idle nodes",
            folder,
        )
        yield {"SLURM_CONF": environ["SLURM_CONF"]}
    finally:
        if len(daemons) == 4:  # steps outlive slurmd, so they go first
            subprocess.run(["scancel", f"--user={getpass.getuser()}"], env=environ, check=False)
            _wait_until(lambda: not _output(["squeue", "--noheader"], environ), "end of all jobs", folder)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _configure(folder: Path) -> None:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        controller_port, first_port, second_port = (each.getsockname()[1] for each in sockets)
    text = _CONFIGURATION.format(
        folder=folder, user=getpass.getuser(), host=socket.gethostname(), nodes=NODES,
        controller_port=controller_port, first_port=first_port, second_port=second_port,
    )  # fmt: skip
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))


def _output(command: list[str], environ: dict[str, str]) -> list[str]:
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False).stdout.split()


def _wait_until(condition: Callable[[], bool], what: str, folder: Path) -> None:
    for _ in range(150):
        if condition():
            return
        time.sleep(0.2)
    logs = "\n".join(
        f"{path.name}: {path.read_text(errors='replace')[-1500:]}"
        for pattern in ("*.out", "*.log")
        for path in sorted(folder.glob(pattern))
    )
    raise TimeoutError(f"Slurm: no {what} within 30 s\n{logs}")


def _find(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
