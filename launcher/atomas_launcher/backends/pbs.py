"""PBS: a job script whose ranks mpirun starts, and which times its own warning, because PBS sends none.

A script that has saved submits itself again: `qrerun` is for operators on many sites.
"""

import re
import shlex

from atomas_launcher.backends.mpi import mpirun, stop_signal
from atomas_launcher.backends.slurm import after_failure, clock, kill_file_test, supervised, warned_time_limit
from atomas_launcher.errors import LaunchError
from atomas_launcher.job import Command, JobSpec, Rendered
from atomas_launcher.process import environment, exports, in_container, script, worker_command
from atomas_launcher.profile import ClusterProfile

SCRIPT = "job.pbs"

# 20000 - 31999, as everywhere, from the job's number
_PORT = """export MASTER_PORT=$((20000 + $(printf %s "$PBS_JOBID" | cksum | cut -d' ' -f1) % 12000))"""


def render(job: JobSpec, profile: ClusterProfile) -> Rendered:
    """A job script and the qsub that submits it."""
    if job.array:
        raise LaunchError("backend pbs has no chain by job array; its jobs submit themselves again instead")
    if job.exclude:
        raise LaunchError(
            "PBS cannot exclude nodes by name; ask for others in the profile's scheduler_options"
        )
    limit = warned_time_limit(job, profile)
    variables = environment(job, profile)
    names = (*variables, "MASTER_ADDR", "MASTER_PORT")
    hosts = "-hostfile" if profile.mpi == "openmpi" else "-f"
    command = " ".join([
        shlex.join(mpirun(job, profile, names)), hosts, '"$PBS_NODEFILE"',
        shlex.join(in_container(worker_command(job, profile), job, profile)),
    ])  # fmt: skip
    own = shlex.quote(str(job.folder / SCRIPT))
    warning = (
        [f"( sleep {limit - profile.warning_seconds}; kill -USR1 $$ ) >/dev/null 2>&1 &"] if limit else []
    )
    text = script(
        "#!/bin/bash -l" if profile.modules else "#!/bin/bash",
        *(f"#PBS {option}" for option in _options(job, profile, limit)),
        "",
        f'exec >>{shlex.quote(str(job.folder))}/"pbs-$PBS_JOBID.out" 2>&1',
        f"cd {shlex.quote(str(job.working_directory))} || exit 2",
        *(f"module load {shlex.quote(module)}" for module in profile.modules),
        *exports(variables),
        """export MASTER_ADDR="$(head -n 1 "$PBS_NODEFILE")\"""",
        _PORT,
        *warning,
        "",
        *supervised(
            command,
            [f"{kill_file_test(job)} && qsub {own}"],
            after_failure(job, profile),
            stop_signal(profile),
        ),
    )
    return Rendered(files={SCRIPT: text}, commands=(Command(arguments=("qsub", str(job.folder / SCRIPT))),))


def _options(job: JobSpec, profile: ClusterProfile, limit: int) -> list[str]:
    gpus = f":ngpus={job.gpus_per_node}" if profile.device == "cuda" else ""
    cpus = job.gpus_per_node * max(1, profile.cpus_per_process)
    options = [
        f"-N {_name(job.name)}",
        f"-l select={job.nodes}:ncpus={cpus}:mpiprocs={job.gpus_per_node}{gpus}",
        "-r y",
        "-j oe",
    ]
    if limit:
        options.append(f"-l walltime={clock(limit)}")
    for flag, what, value in (("-q", "partition", profile.partition), ("-A", "account", profile.account)):
        if value and not re.fullmatch(r"[\w.@:+/-]+", value):
            raise LaunchError(f"{what} {value!r} cannot be written in a #PBS line")
        options += [f"{flag} {value}"] if value else []
    return [*options, *profile.scheduler_options]


def _name(name: str) -> str:
    """A name as PBS takes it: no blanks, a letter first, 15 characters on older servers."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    return (plain if plain[:1].isalpha() else f"a{plain}")[:15]
