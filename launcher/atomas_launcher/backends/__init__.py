"""One module per back end: `render(job, profile)` says what would be written and run, and touches nothing."""

from collections.abc import Callable

from atomas_launcher.backends.deepspeed import render as render_deepspeed
from atomas_launcher.backends.kubernetes import render as render_kubernetes
from atomas_launcher.backends.local import render as render_local
from atomas_launcher.backends.mpi import render as render_mpi
from atomas_launcher.backends.pbs import render as render_pbs
from atomas_launcher.backends.slurm import render as render_slurm
from atomas_launcher.backends.slurm import render_step
from atomas_launcher.backends.torchrun import render as render_torchrun
from atomas_launcher.errors import LaunchError
from atomas_launcher.job import JobSpec, Rendered
from atomas_launcher.profile import ClusterProfile

RENDERERS: dict[str, Callable[[JobSpec, ClusterProfile], Rendered]] = {
    "local": render_local,
    "torchrun": render_torchrun,
    "deepspeed": render_deepspeed,
    "slurm": render_slurm,
    "srun": render_step,
    "mpi": render_mpi,
    "pbs": render_pbs,
    "kubernetes": render_kubernetes,
}


def render(job: JobSpec, profile: ClusterProfile) -> Rendered:
    """What the profile's back end makes of a job.

    Raises:
        LaunchError: the back end cannot do what is asked.
    """
    if job.preflight and profile.backend != "slurm":
        raise LaunchError(
            f"backend {profile.backend} cannot leave out nodes by itself; start `doctor --distributed` before the job"
        )
    if job.restarts and profile.backend == "kubernetes":
        raise LaunchError("on Kubernetes the runtime's failure policy says how often a job is started again")
    return RENDERERS[profile.backend](job, profile)
