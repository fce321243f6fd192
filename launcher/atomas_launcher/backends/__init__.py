"""One module per back end: `render(job, profile)` says what would be written and run, and touches nothing."""

from collections.abc import Callable

from atomas_launcher.backends import deepspeed, kubernetes, local, mpi, pbs, slurm, torchrun
from atomas_launcher.job import JobSpec, Rendered
from atomas_launcher.profile import ClusterProfile

RENDERERS: dict[str, Callable[[JobSpec, ClusterProfile], Rendered]] = {
    "local": local.render,
    "torchrun": torchrun.render,
    "deepspeed": deepspeed.render,
    "slurm": slurm.render,
    "srun": slurm.render_step,
    "mpi": mpi.render,
    "pbs": pbs.render,
    "kubernetes": kubernetes.render,
}


def render(job: JobSpec, profile: ClusterProfile) -> Rendered:
    """What the profile's back end makes of a job.

    Raises:
        LaunchError: the back end cannot do what is asked.
    """
    return RENDERERS[profile.backend](job, profile)
