"""DeepSpeed's own launcher: on this host, or over pdsh with a file of hosts.

Its pdsh command quotes little: it goes through a shell on the other side with arguments, working folder and variables
as they are. So it is given the path of one script, which holds command and environment, properly quoted.
"""

import base64
import json
import re
import shlex

from atomas_launcher.backends.torchrun import chosen_hosts
from atomas_launcher.errors import LaunchError
from atomas_launcher.job import Command, JobSpec, Rendered
from atomas_launcher.process import environment, exports, in_container, script, worker_command
from atomas_launcher.profile import ClusterProfile

_PLAIN = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
"""What a shell reads as it stands."""


def render(job: JobSpec, profile: ClusterProfile) -> Rendered:
    """The script of one process, a file of hosts, a file of variables, and the `deepspeed` that reads them."""
    folder, variables = job.folder, environment(job, profile)
    for path in (folder, job.working_directory):
        if not _PLAIN.fullmatch(str(path)):
            raise LaunchError(
                f"deepspeed's launcher cannot quote the path {str(path)!r}; use the torchrun back end"
            )
    worker = script(
        "#!/bin/bash",
        f"cd {job.working_directory} || exit 2",
        *exports(variables),
        f"exec {shlex.join(in_container(worker_command(job, profile), job, profile))}",
    )
    options = ["--no_python", "--no_local_rank", f"--master_port={job.port}"]
    program = str(folder / "worker.sh")
    if job.nodes == 1 and not profile.hosts:
        # not through its runner, which would only start this, and dies of a signal without handing it on
        agent = (job.python, "-m", "deepspeed.launcher.launch", f"--world_info={_world_info(job)}")
        arguments = (*agent, *options, program)
        return Rendered(
            files={"worker.sh": worker}, commands=(Command(arguments=arguments, environment=variables),)
        )
    hosts = chosen_hosts(job, profile)
    # DeepSpeed would look for it with an ssh that knows nothing of the profile's options
    options += [f"--hostfile={folder / 'hostfile'}", f"--master_addr={hosts[0].rpartition('@')[2]}"]
    ours = {
        **variables,
        # its agents on the other hosts; whatever a shell would read differently reaches the ranks by the script
        "DS_ENV_FILE": str(folder / "deepspeed_env"),
        "PDSH_SSH_ARGS_APPEND": " ".join(["-o BatchMode=yes", *profile.ssh_options]),
    }
    plain = {name: value for name, value in variables.items() if _PLAIN.fullmatch(value)}
    files = {
        "worker.sh": worker,
        "hostfile": script(*(f"{host} slots={job.gpus_per_node}" for host in hosts)),
        "deepspeed_env": script(*(f"{name}={value}" for name, value in plain.items())),
    }
    multi = ("--launcher=pdsh", "--force_multi", "--no_ssh_check")
    arguments = (job.python, "-m", "deepspeed.launcher.runner", *multi, *options, program)
    return Rendered(files=files, commands=(Command(arguments=arguments, environment=ours),))


def _world_info(job: JobSpec) -> str:
    """Hosts and their devices as the agent reads them."""
    return base64.urlsafe_b64encode(
        json.dumps({"localhost": list(range(job.gpus_per_node))}).encode()
    ).decode()
