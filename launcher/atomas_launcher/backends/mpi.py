"""mpirun of Open MPI, Intel MPI or MPICH, with or without a file of hosts; inside an allocation it finds the nodes."""

import shlex
import signal

from atomas_launcher.backends.torchrun import chosen_hosts
from atomas_launcher.errors import LaunchError
from atomas_launcher.job import Command, JobSpec, Rendered
from atomas_launcher.process import environment, in_container, script, worker_command
from atomas_launcher.profile import ClusterProfile

SSH = "ssh.sh"
_WITH_SSH = {
    "openmpi": ("--mca", "plm_rsh_agent"),
    "intelmpi": ("-bootstrap", "ssh", "-bootstrap-exec"),
    "mpich": ("-launcher", "ssh", "-launcher-exec"),
}
"""Options that name the program by which the hosts are reached; it follows."""


def render(job: JobSpec, profile: ClusterProfile) -> Rendered:
    """One mpirun.

    Raises:
        LaunchError: Open MPI could not start it.
    """
    variables = {**environment(job, profile), "MASTER_PORT": str(job.port)}
    files = {}
    hosts: list[str] = []
    if profile.hosts:
        names = chosen_hosts(job, profile)
        variables["MASTER_ADDR"] = names[0].rpartition("@")[2]
        slots = " slots=" if profile.mpi == "openmpi" else ":"
        files["hostfile"] = script(*(f"{name}{slots}{job.gpus_per_node}" for name in names))
        hosts = ["-hostfile" if profile.mpi == "openmpi" else "-f", str(job.folder / "hostfile")]
        if profile.ssh_options:
            if profile.mpi == "openmpi" and " " in str(job.folder):
                raise LaunchError(
                    f"Open MPI cuts the name of its ssh program at spaces, and {job.folder} has one: choose a folder "
                    "without, or put ssh_options into ~/.ssh/config"
                )
            files[SSH] = script("#!/bin/sh", f'exec ssh {shlex.join(profile.ssh_options)} "$@"')
            hosts += [*_WITH_SSH[profile.mpi], str(job.folder / SSH)]
    arguments = (
        *mpirun(job, profile, tuple(variables)),
        *hosts,
        *in_container(worker_command(job, profile), job, profile),
    )
    command = Command(arguments=arguments, environment=variables, stop_signal=stop_signal(profile))
    return Rendered(files=files, commands=(command,))


def mpirun(job: JobSpec, profile: ClusterProfile, variables: tuple[str, ...]) -> list[str]:
    """The mpirun of this MPI with its options; hosts and command follow.

    Variables go by name; their values are in the environment of mpirun itself.
    """
    total, each = str(job.world_size), str(job.gpus_per_node)
    if profile.mpi == "openmpi":
        # not bound to a core each: the loader's processes and OpenMP would share that one
        options = ["mpirun", "-np", total, "--map-by", f"ppr:{each}:node", "--bind-to", "none"]
        return [*options, *(word for name in variables for word in ("-x", name))]
    # Intel MPI's mpirun is a shell script around the other, and dies of a signal without handing it on
    program = "mpiexec.hydra" if profile.mpi == "intelmpi" else "mpiexec"
    return [program, "-n", total, "-ppn", each, "-genvlist", ",".join(variables)]


def stop_signal(profile: ClusterProfile) -> signal.Signals:
    """What this MPI's mpirun hands on to the ranks, and then waits for them.

    Open MPI kills them a second after SIGTERM, and only forwards SIGUSR1; the others forward both.
    """
    return signal.SIGUSR1 if profile.mpi == "openmpi" else signal.SIGTERM
