"""torchrun: on this host, or one agent per host over ssh, meeting by c10d or by fixed node ranks."""

import shlex

from atomas_launcher.errors import LaunchError
from atomas_launcher.job import Command, JobSpec, Rendered
from atomas_launcher.process import (
    TORCHRUN_ENVIRONMENT,
    environment,
    exports,
    in_container,
    script,
    torchrun_command,
    worker_command,
)
from atomas_launcher.profile import ClusterProfile


def render(job: JobSpec, profile: ClusterProfile) -> Rendered:
    """One agent here, or on each host a script that starts one."""
    variables = {**environment(job, profile), **TORCHRUN_ENVIRONMENT}
    if job.nodes == 1 and not profile.hosts:
        command = [*torchrun_command(job), "--standalone", *worker_command(job, profile)]
        return Rendered(
            commands=(Command(arguments=tuple(in_container(command, job, profile)), environment=variables),)
        )
    hosts = chosen_hosts(job, profile)
    files, commands = {}, []
    for rank, host in enumerate(hosts):
        agent = [*torchrun_command(job), f"--nnodes={job.nodes}", *_meeting(job, profile, hosts[0], rank)]
        command = in_container([*agent, *worker_command(job, profile)], job, profile)
        files[f"node_{rank}.sh"] = script(
            "#!/bin/bash",
            f"cd {shlex.quote(str(job.working_directory))} || exit 2",
            *exports(variables),
            f"exec {shlex.join(command)}",
        )
        # a terminal: its end is the only thing that ssh tells the other side when it is killed itself
        ssh = ["ssh", "-tt", "-o", "BatchMode=yes", *profile.ssh_options, host]
        remote = shlex.join(["bash", str(job.folder / f"node_{rank}.sh")])
        commands.append(Command(arguments=(*ssh, remote)))
    return Rendered(files=files, commands=tuple(commands))


def chosen_hosts(job: JobSpec, profile: ClusterProfile) -> tuple[str, ...]:
    """The first `nodes` hosts of the profile that are not excluded.

    Raises:
        LaunchError: there are too few, or a host's name would be read as an option.
    """
    hosts = tuple(host for host in profile.hosts if host not in job.exclude)
    if len(hosts) < job.nodes:
        raise LaunchError(
            f"{job.nodes} nodes are asked for and {len(hosts)} hosts are known; give them as --hosts A,B or in the "
            "profile's `hosts`"
        )
    for host in hosts:
        if not host or host.startswith("-") or not set(host) <= _HOST_CHARACTERS:
            raise LaunchError(f"{host!r} is not the name of a host")
    return hosts[: job.nodes]


_HOST_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_@")


def _meeting(job: JobSpec, profile: ClusterProfile, first: str, rank: int) -> list[str]:
    address = first.rpartition("@")[2]
    if profile.rendezvous == "static":
        return [f"--node-rank={rank}", f"--master-addr={address}", f"--master-port={job.port}"]
    return ["--rdzv-backend=c10d", f"--rdzv-endpoint={address}:{job.port}", f"--rdzv-id={job.identifier}"]
