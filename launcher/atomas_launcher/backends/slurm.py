"""Slurm: a batch job that saves before its limit and requeues itself, or a step in an allocation that is there.

srun starts one task per GPU and is the only thing between Slurm and the ranks. The batch script has the warning
signal sent to itself (B:) and hands it to srun, which hands it to every task.
"""

import shlex
import signal

from atomas_launcher.errors import LaunchError
from atomas_launcher.job import Command, JobSpec, Rendered
from atomas_launcher.process import (
    RESUME_EXIT_CODE,
    autopsy_command,
    environment,
    exports,
    in_container,
    script,
    time_limit,
    worker_command,
)
from atomas_launcher.profile import ClusterProfile

SCRIPT = "job.sbatch"
STOP_SIGNAL = signal.SIGUSR1
"""What srun hands on to the ranks; of SIGTERM or SIGINT it kills them."""


def render(job: JobSpec, profile: ClusterProfile) -> Rendered:
    """A job script and the sbatch that submits it."""
    text = script(
        # a login shell, where `module` is defined
        "#!/bin/bash -l" if profile.modules else "#!/bin/bash",
        *(f"#SBATCH {option}" for option in _options(job, profile)),
        "",
        f"cd {shlex.quote(str(job.working_directory))} || exit 2",
        *(f"module load {shlex.quote(module)}" for module in profile.modules),
        *exports(environment(job, profile)),
        "",
        *(_preflight(job, profile) if job.preflight else ()),
        *supervised(shlex.join(_step(job, profile)), _again(job), after_failure(job, profile), STOP_SIGNAL),
    )
    if set(str(job.folder)) & set("%\\"):
        raise LaunchError(
            f"Slurm replaces % and backslashes in the path of its output, {str(job.folder)!r}; rename it"
        )
    # the output's name is relative to this folder, so that no directive has to quote it
    command = ("sbatch", "--parsable", f"--chdir={job.folder}", str(job.folder / SCRIPT))
    return Rendered(files={SCRIPT: text}, commands=(Command(arguments=command),))


def render_step(job: JobSpec, profile: ClusterProfile) -> Rendered:
    """A step in an allocation that is there already."""
    arguments, variables = tuple(_step(job, profile)), environment(job, profile)
    command = Command(arguments=arguments, environment=variables, stop_signal=STOP_SIGNAL)
    return Rendered(commands=(command,))


def supervised(command: str, again: list[str], failed: str | None, stop: signal.Signals) -> list[str]:
    """Shell that runs a command, hands signals on to it, and reads its exit code.

    Args:
        command: quoted already.
        again: lines that start the job again, run where it has saved and been told to stop, and not been cancelled.
        failed: decides whether that is done after a failure as well; None: it is not.
        stop: what the command is sent in place of SIGTERM.
    """
    is_wanted = f'[ "$status" -eq {RESUME_EXIT_CODE} ]'
    if failed is not None:
        is_wanted = f"{{ {is_wanted} || {failed}; }}"
    return [
        "child= cancelled= status=",
        """trap '[ -z "$child" ] || kill -USR1 "$child"' USR1""",
        f"""trap 'cancelled=yes; [ -z "$child" ] || kill -{stop.name.removeprefix("SIG")} "$child"' TERM""",
        f"{command} &",
        "child=$!",
        "# a signal ends `wait` early, so until the command itself has ended",
        'while kill -0 "$child" 2>/dev/null; do wait "$child"; status=$?; done',
        'wait "$child" 2>/dev/null; ended=$?; [ "$ended" -eq 127 ] || status=$ended',
        f'if [ -z "$cancelled" ] && {is_wanted}; then',
        *(f"  {line}" for line in again),
        "fi",
        'exit "$status"',
    ]


def after_failure(job: JobSpec, profile: ClusterProfile) -> str | None:
    """Shell: true where a job that failed shall start again; None where it never does."""
    if not job.restarts:
        return None
    decide = [job.python, "-m", "atomas_launcher.restarts", f"--budget={job.restarts}", "--status", "STATUS"]
    rest = [f"--record={job.folder / 'failures.jsonl'}", "--", *autopsy_command(job)]
    command = shlex.join(in_container([*decide, *rest], job, profile))
    return command.replace("--status STATUS", '--status "$status"', 1)


def kill_file_test(job: JobSpec) -> str:
    """Shell: true where nobody has asked the run to stop."""
    return f"[ ! -e {shlex.quote(str(job.run_directory / 'KILL'))} ]" if job.run_directory else "true"


def _again(job: JobSpec) -> list[str]:
    if job.array:
        return ["echo 'saved; the next job of the array continues'"]
    return [f'{kill_file_test(job)} && scontrol requeue "$SLURM_JOB_ID"']


def _preflight(job: JobSpec, profile: ClusterProfile) -> list[str]:
    """Shell: `doctor` on every node; the job leaves out those that are not well, and starts again without them."""
    folder = job.run_directory or job.folder
    doctor = in_container([job.python, "-m", "atomas", "doctor", f"--folder={folder}"], job, profile)
    each = [
        "srun",
        f"--nodes={job.nodes}",
        f"--ntasks={job.nodes}",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=0",
    ]
    told = ["bash", "-c", '"$@" >&2 || echo "$SLURMD_NODENAME"', "doctor", *doctor]
    return [
        f"unwell=$({shlex.join([*each, '--export=ALL', '--', *told])} | sort -u | paste -sd, -)",
        'if [ -n "$unwell" ]; then',
        '  echo "preflight: not well, and left out from now on: $unwell"',
        r"""  before=$(scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^( ]*\).*/\1/p')""",
        "  trap '' TERM  # requeueing ends this script, and only a job that waits may be told what to leave out",
        '  scontrol requeue "$SLURM_JOB_ID"',
        '  scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=${before:+$before,}$unwell"',
        "  exit 1",
        "fi",
        "",
    ]


def _options(job: JobSpec, profile: ClusterProfile) -> list[str]:
    limit = warned_time_limit(job, profile)
    options = [
        ("job-name", job.name),
        ("nodes", str(job.nodes)),
        ("ntasks-per-node", str(job.gpus_per_node)),
        ("output", "slurm-%A_%a.out" if job.array else "slurm-%j.out"),
        ("open-mode", "append"),
        ("signal", f"B:USR1@{profile.warning_seconds}"),
    ]
    if profile.device == "cuda" and profile.gpu_request != "none":
        request = f"gpu:{job.gpus_per_node}" if profile.gpu_request == "gres" else str(job.gpus_per_node)
        options.append((profile.gpu_request, request))
    if profile.cpus_per_process:
        options.append(("cpus-per-task", str(profile.cpus_per_process)))
    if limit:
        options.append(("time", clock(limit)))
    given = (
        ("partition", profile.partition),
        ("account", profile.account),
        ("array", job.array),
        ("exclude", ",".join(job.exclude)),
    )
    options += [(name, value) for name, value in given if value]
    lines = [f"--{name}={_directive(value)}" for name, value in options]
    return [*lines, "--requeue", *(_directive_option(option) for option in profile.scheduler_options)]


def _step(job: JobSpec, profile: ClusterProfile) -> list[str]:
    cpus = [f"--cpus-per-task={profile.cpus_per_process}"] if profile.cpus_per_process else []
    return [
        "srun", f"--nodes={job.nodes}", f"--ntasks={job.world_size}", f"--ntasks-per-node={job.gpus_per_node}",
        *cpus,  # srun does not take it from sbatch since Slurm 22.05
        # Not --kill-on-bad-exit: the first rank that has saved would have the others killed while they end, and the
        # job's exit code would be theirs. A rank that dies ends the others after this wait.
        "--kill-on-bad-exit=0", "--wait=60", "--export=ALL", "--",
        *in_container(worker_command(job, profile), job, profile),
    ]  # fmt: skip


def _directive(value: str) -> str:
    """A value as sbatch's own parser of #SBATCH lines reads it: quoted where it must be."""
    if value and all(character.isalnum() or character in "_@%+=:,./-" for character in value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _directive_option(option: str) -> str:
    """A whole option such as --exclusive or --mem=0."""
    name, equals, value = option.partition("=")
    return f"{name}={_directive(value)}" if equals else name


def warned_time_limit(job: JobSpec, profile: ClusterProfile) -> int:
    """Seconds of the limit, or 0.

    Raises:
        LaunchError: the warning would come before the start.
    """
    limit = time_limit(job, profile)
    if limit and limit <= profile.warning_seconds:
        raise LaunchError(
            f"a time limit of {limit} s leaves nothing before the warning {profile.warning_seconds} s ahead of it; "
            "set a longer one, or the profile's warning_seconds"
        )
    return limit


def clock(limit: int) -> str:
    """Seconds -> HH:MM:SS."""
    return f"{limit // 3600:02d}:{limit // 60 % 60:02d}:{limit % 60:02d}"
