"""The processes of one host, started by `atomas launch` itself: no agent between them and their exit code."""

from atomas_launcher.errors import LaunchError
from atomas_launcher.job import Command, JobSpec, Rendered
from atomas_launcher.process import environment, in_container, worker_command
from atomas_launcher.profile import ClusterProfile


def render(job: JobSpec, profile: ClusterProfile) -> Rendered:
    """A command per process, each with torch's own variables."""
    if job.nodes > 1:
        raise LaunchError(f"backend local is one host, and {job.nodes} nodes are asked for; use torchrun")
    command = tuple(in_container(worker_command(job, profile), job, profile))
    shared = {
        **environment(job, profile),
        "WORLD_SIZE": str(job.world_size),
        "LOCAL_WORLD_SIZE": str(job.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(job.port),
    }
    ranks = range(job.world_size)
    return Rendered(
        commands=tuple(
            Command(arguments=command, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in ranks
        )
    )
