"""What every back end says alike: the command of one process, its environment, and lines of shell.

Whatever comes from a user reaches a shell only through `shlex`.
"""

import shlex
from collections.abc import Mapping, Sequence

from atomas_launcher.job import JobSpec
from atomas_launcher.placement import launcher_variables
from atomas_launcher.profile import FABRICS, ClusterProfile, seconds

RESUME_EXIT_CODE = 75
"""EX_TEMPFAIL, as `atomas train` ends after a stop that was asked for: saved, wants to be started again."""

FORWARDED_PREFIXES = (
    "ATOMAS_", "NCCL_", "GLOO_", "UCX_", "FI_", "OMP_", "MKL_", "KMP_", "TORCH_", "PYTORCH_", "TRITON_", "CUDA_",
    "DS_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "PYTHONPATH", "LD_LIBRARY_PATH", "PATH",
)  # fmt: skip
"""Variables of the submitting shell that decide how training runs; ssh and deepspeed forward few of them or none."""
_HOST_PATHS = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")
_SECRET_ENDINGS = ("TOKEN", "KEY", "SECRET", "PASSWORD")


def forwarded(environ: Mapping[str, str]) -> dict[str, str]:
    """The part of a shell's environment that a job takes along."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith(FORWARDED_PREFIXES)
        and not name.endswith(_SECRET_ENDINGS)
        and name != "CUDA_VISIBLE_DEVICES"  # a fact of this host
    }


def environment(job: JobSpec, profile: ClusterProfile) -> dict[str, str]:
    """Every variable that a process is given: fabric preset, shell, profile, command line; later ones win."""
    inherited = dict(job.inherited)
    if profile.container.image or profile.modules:  # both bring paths of their own
        inherited = {name: value for name, value in inherited.items() if name not in _HOST_PATHS}
    # a line of a dying process is worth more than the time that buffering saves
    given = {
        "PYTHONUNBUFFERED": "1",
        "DS_ACCELERATOR": profile.device,
        **FABRICS[profile.fabric],
        **inherited,
    }
    return {**given, **profile.environment, **job.environment}


def worker_command(job: JobSpec, profile: ClusterProfile) -> list[str]:
    """The command of one process, which finds the interfaces of its node and becomes `python -m atomas`."""
    options = [f"--interfaces={','.join(profile.interfaces)}"] if profile.interfaces else []
    if profile.scratch:
        options.append(f"--scratch={profile.scratch}")
    atomas = [job.python, "-m", "atomas", *job.arguments]
    return [job.python, "-m", "atomas_launcher.worker", *options, "--", *atomas]


def autopsy_command(job: JobSpec) -> list[str]:
    """The command that says, as JSON, how the run's newest attempt ended."""
    return [job.python, "-m", "atomas", "doctor", str(job.run_directory), "--json"]


def in_container(command: Sequence[str], job: JobSpec, profile: ClusterProfile) -> list[str]:
    """A command inside the profile's image, if it has one."""
    container = profile.container
    if container.runtime == "none":
        return list(command)
    binds = [str(job.working_directory), *container.binds]
    if container.runtime == "apptainer":  # hands the environment on by itself
        gpus = ["--nv"] if profile.device == "cuda" else []
        mounts = [f"--bind={bind}" for bind in binds]
        return [
            "apptainer",
            "exec",
            *gpus,
            *mounts,
            f"--pwd={job.working_directory}",
            container.image,
            *command,
        ]
    gpus = ["--gpus=all"] if profile.device == "cuda" else []
    # shared memory of the host: NCCL and the loader's processes want more than Docker's 64 MiB
    shared = ["--network=host", "--ipc=host", "--ulimit=memlock=-1", "--init"]
    mounts = [f"--volume={bind if ':' in bind else f'{bind}:{bind}'}" for bind in binds]
    names = dict.fromkeys([*environment(job, profile), *launcher_variables()])
    variables = [
        f"--env={name}" for name in names
    ]  # without a value: taken from the caller, if it is set there
    user = [f"--user={job.user}"] if job.user else []
    where = [f"--workdir={job.working_directory}"]
    return [
        "docker",
        "run",
        "--rm",
        *gpus,
        *shared,
        *user,
        *mounts,
        *where,
        *variables,
        container.image,
        *command,
    ]


def torchrun_command(job: JobSpec) -> list[str]:
    """The torchrun of the job's own interpreter; its options follow."""
    return [job.python, "-m", "torch.distributed.run", "--no-python", f"--nproc-per-node={job.gpus_per_node}"]


TORCHRUN_ENVIRONMENT = {
    # By variable and not by flag, because a torchrun without these options then ignores them. Without them SIGUSR1
    # kills the agent and leaves its workers behind, and workers have 30 s for a save.
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2",
    "PET_SHUTDOWN_TIMEOUT": "300",
}
"""What torchrun must be told beside its options."""


def time_limit(job: JobSpec, profile: ClusterProfile) -> int:
    """Seconds of the job's limit, or the profile's; 0 where there is none."""
    return job.time_limit or (seconds(profile.time_limit) if profile.time_limit else 0)


def exports(variables: Mapping[str, str]) -> list[str]:
    """A line of shell per variable."""
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


def script(*lines: str) -> str:
    """The text of a shell script."""
    return "\n".join(lines) + "\n"
