"""`atomas launch`, and `python -m atomas_launcher` on a login node that has neither torch nor atomas."""

import argparse
import dataclasses
import datetime
import os
import re
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from atomas_launcher import records, restarts, runner
from atomas_launcher.backends import render
from atomas_launcher.errors import LaunchError
from atomas_launcher.job import Command, JobSpec, Rendered
from atomas_launcher.process import autopsy_command, forwarded, in_container
from atomas_launcher.profile import BACKENDS, ClusterProfile, find_profile, seconds

ACTIONS = ("status", "logs", "cancel")

DESCRIPTION = """\
Start a command of Atomas with one process per GPU, here or on a cluster. What a cluster is stands in a profile:
configs/clusters/NAME.yaml, ~/.config/atomas/clusters/NAME.yaml, or any file. --dry-run prints what would be written
and run, and how the batch is divided, and does nothing."""

EPILOG = """\
Examples:
  atomas launch --gpus-per-node 2 -- train --config configs/train/demo.yaml
  atomas launch --cluster slurm-generic --nodes 2 --gpus-per-node 8 --dry-run -- train --config FILE
  atomas launch --cluster slurm-generic --nodes 2 --time 24:00:00 --array 1-10%1 -- train --config FILE
  atomas launch --backend torchrun --hosts n1,n2 --gpus-per-node 8 -- train --config FILE
  atomas launch status             every job, with its state
  atomas launch logs JOB --rank 3  the last lines of a rank's log
  atomas launch cancel JOB
JOB is the id that the launch printed, the scheduler's number, or the run's name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a configuration says that a launch wants to know."""

    name: str
    directory: Path
    """The run's folder."""
    batch_size: int
    """Pairs in the contrastive batch over all ranks."""
    micro_batch_size: int
    """Pairs of one rank that are held at once; 0 holds all."""
    accumulation: int
    """Batches per optimizer step."""
    max_steps: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options and positionals of `launch`."""
    add = parser.add_argument
    add("--cluster", metavar="NAME|FILE", help="profile of the cluster; without it, this host")
    add("--backend", choices=BACKENDS, help="how to start; overrides the profile's")
    add(
        "--nodes", type=int, default=None, metavar="N", help="hosts (default: 1, or as many as --hosts names)"
    )
    add("--gpus-per-node", type=int, metavar="G", help="processes of a host (default: the profile's)")
    add("--hosts", metavar="A,B", help="hosts for torchrun, deepspeed, mpi; rank 0's first")
    add("--time", metavar="LIMIT", help="HH:MM:SS, D-HH:MM:SS or minutes")
    add(
        "--array", default="", metavar="SPEC", help="Slurm: a chain of jobs that continue one run, as 1-10%%1"
    )
    add("--exclude", default="", metavar="A,B", help="nodes not to use")
    add("--restarts", type=int, default=0, metavar="N", help="start again after a failure, up to N times")
    add(
        "--preflight",
        action="store_true",
        help="Slurm: check every node first, leave out those that are not well",
    )
    add(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable for every process; repeatable",
    )
    add("--name", help="name of the job (default: the run's)")
    add(
        "--run-directory", metavar="DIR", help="the run's folder, where the configuration cannot be read here"
    )
    add("--dry-run", action="store_true", help="print what would be written and run, and do nothing")
    add("--rank", type=int, metavar="R", help="logs: of this rank")
    add("--lines", type=int, default=40, metavar="N", help="logs: how many lines (default: 40)")
    add(
        "command",
        nargs="*",
        metavar="-- COMMAND",
        help="a command of Atomas after --; or status, logs, cancel JOB",
    )


def run(args: argparse.Namespace, describe: Callable[[Sequence[str]], Run | None]) -> int:
    """Do what was asked; the exit code.

    Args:
        args: of `add_arguments`.
        describe: reads the command's configuration; None where it has none.

    Raises:
        LaunchError: a mistake in the request.
    """
    if args.command and args.command[0] in ACTIONS:
        return _act(args.command[0], args.command[1:], args)
    profile = _profile(args)
    described = describe(args.command)
    job = _job(args, profile, described)
    rendered = render(job, profile)
    for line in summary(
        job, profile, described
    ):  # what the command itself prints stays alone in standard output
        print(line, file=sys.stdout if args.dry_run else sys.stderr)
    kill = None if job.run_directory is None else job.run_directory / "KILL"
    if kill is not None and kill.exists():
        raise LaunchError(f"{kill} exists, so the run would stop at once: remove it to go on")
    if args.dry_run:
        print(dry_run(rendered, job))
        return 0
    return _start(rendered, job, profile)


def summary(job: JobSpec, profile: ClusterProfile, described: Run | None) -> list[str]:
    """Placement and batch arithmetic."""
    ranks, devices = job.world_size, "GPUs" if profile.device == "cuda" else "processes"
    lines = [f"{profile.backend}: {job.nodes} hosts x {job.gpus_per_node} {devices} = {ranks} ranks"]
    if described is None:
        return lines
    lines.append(f"run: {job.run_directory}")
    pairs, steps, batches = described.batch_size, described.max_steps, described.accumulation
    if pairs % ranks:
        legal = ", ".join(str(n) for n in range(1, pairs + 1) if pairs % n == 0)
        raise LaunchError(
            f"data.batch_size = {pairs} cannot be divided among {ranks} ranks; numbers that divide it: {legal}"
        )
    own, micro = pairs // ranks, described.micro_batch_size
    is_cut = 0 < micro < own
    if is_cut and own % micro:
        raise LaunchError(f"training.micro_batch_size = {micro} does not divide the {own} pairs of a rank")
    passes = f" in {own // micro} micro-batches of {micro}" if is_cut else ""
    lines.append(
        f"batch: {pairs} pairs / {ranks} ranks = {own} pairs per rank{passes}; x {batches} batches per step "
        f"x {steps} steps = {pairs * batches * steps} pairs"
    )
    return lines


def dry_run(rendered: Rendered, job: JobSpec) -> str:
    """Every file and every command, as they would be written and run."""
    parts = [f"would write {job.folder / name}:\n{_indented(text)}" for name, text in rendered.files.items()]
    parts.append("would run:\n" + "\n".join(f"  {_shell(command)}" for command in rendered.commands))
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m atomas_launcher ARGS`; exit code 2 on a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="atomas_launcher", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_arguments(parser)
    try:
        sys.exit(run(parser.parse_args(argv), lambda _command: None))
    except LaunchError as error:
        print(f"atomas_launcher: error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader has seen enough
        sys.stderr.close()
        sys.exit(1)


def _profile(args: argparse.Namespace) -> ClusterProfile:
    profile = find_profile(args.cluster) if args.cluster else ClusterProfile()
    given: dict[str, object] = {}
    if args.backend:
        given["backend"] = args.backend
    if args.hosts:
        given["hosts"] = tuple(args.hosts.split(","))
    if not args.cluster and not Path("/dev/nvidiactl").exists():
        given["device"] = "cpu"
    return dataclasses.replace(profile, **given)  # type: ignore[arg-type]


def _job(args: argparse.Namespace, profile: ClusterProfile, described: Run | None) -> JobSpec:
    run_directory = Path(args.run_directory) if args.run_directory else described and described.directory
    run_directory = run_directory.absolute() if run_directory else None
    identifier = secrets.token_hex(4)
    name = args.name or (described.name if described else run_directory.name if run_directory else "atomas")
    in_image = profile.container.image != ""
    return JobSpec(
        arguments=tuple(args.command),
        name=name,
        identifier=f"{_file_name(name)}-{identifier}",
        nodes=args.nodes if args.nodes is not None else len(args.hosts.split(",")) if args.hosts else 1,
        gpus_per_node=profile.gpus_per_node if args.gpus_per_node is None else args.gpus_per_node,
        folder=_next_folder(run_directory, identifier),
        working_directory=Path.cwd(),
        run_directory=run_directory,
        python=profile.python or ("python3" if in_image else sys.executable),
        inherited=forwarded(os.environ),
        environment=_variables(args.env),
        time_limit=seconds(args.time) if args.time else None,
        array=args.array,
        exclude=tuple(part for part in args.exclude.split(",") if part),
        restarts=args.restarts,
        preflight=args.preflight,
        user=f"{os.getuid()}:{os.getgid()}",
    )


def _variables(given: Sequence[str]) -> dict[str, str]:
    variables = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals and name not in os.environ:
            raise LaunchError(f"--env {name}: it is not set in this shell; give --env {name}=VALUE")
        variables[name] = value if equals else os.environ[name]
    return variables


def _next_folder(run_directory: Path | None, identifier: str) -> Path:
    """A new folder for the files of this start: earlier ones and their logs stay."""
    if run_directory is None:
        return Path.cwd() / "launch" / identifier
    folder = run_directory / "launch"
    numbers = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    return folder / str(max(numbers, default=0) + 1)


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", text)[:40]


def _start(rendered: Rendered, job: JobSpec, profile: ClusterProfile) -> int:
    runner.write_files(rendered, job.folder)
    record = records.JobRecord(
        id="",
        backend=profile.backend,
        name=job.name,
        folder=str(job.folder),
        run_directory=None if job.run_directory is None else str(job.run_directory),
        submitted=datetime.datetime.now().astimezone().isoformat(timespec="milliseconds"),
    )
    if profile.backend in records.SCHEDULERS:
        answer = runner.submit(rendered.commands[0])
        record.scheduler_id = answer.partition(";")[0]  # sbatch on a federation: NUMBER;CLUSTER
        record.namespace = profile.kubernetes.namespace if profile.backend == "kubernetes" else ""
        record.id = f"{profile.backend}-{_file_name(record.scheduler_id.rpartition('/')[2])}"
        records.write_record(record)
        print(f"submitted {record.id}: `atomas launch status|logs|cancel {record.id}`")
        return 0
    record.host, record.pid = socket.gethostname(), os.getpid()
    record.start_ticks = records.start_ticks(record.pid)
    record.id = f"{profile.backend}-{job.identifier.rpartition('-')[2]}"
    records.write_record(record)
    print(f"started {record.id}: `atomas launch status|logs|cancel {record.id}`", file=sys.stderr)
    record.exit_code = _run_with_restarts(rendered, job, profile)
    records.write_record(record)
    return record.exit_code


def _run_with_restarts(rendered: Rendered, job: JobSpec, profile: ClusterProfile) -> int:
    """Run the job; again after failures, while nothing speaks against it. The last exit code."""
    failures: list[restarts.Failure] = []
    while True:
        code, was_asked = runner.run_together(rendered.commands)
        # torchrun and deepspeed end with a failure of their own where they were told to stop
        if not job.restarts or was_asked or not restarts.is_failure(code):
            return code
        failures.append(restarts.diagnose(code, in_container(autopsy_command(job), job, profile)))
        reason = restarts.obstacle(failures, job.restarts)
        if reason:
            print(f"not started again: {reason}", file=sys.stderr)
            return code
        wait = restarts.wait_seconds(len(failures))
        told = failures[-1].story or f"exit code {code}"
        print(f"failed: {told}; started again in {wait:.0f} s", file=sys.stderr)
        time.sleep(wait)


def _act(action: str, jobs: Sequence[str], args: argparse.Namespace) -> int:
    if action == "status" and not jobs:
        for record in records.all_records():
            print(_status(record))
        return 0
    if len(jobs) != 1:
        raise LaunchError(f"`{action}` takes one JOB; `status` alone lists all")
    record = records.find_record(jobs[0])
    if action == "status":
        print(_status(record))
    elif action == "logs":
        print("\n".join(records.log_lines(record, args.rank, args.lines)))
    else:
        print(records.cancel(record))
    return 0


def _status(record: records.JobRecord) -> str:
    parts = [record.id, record.name, record.submitted[:19], records.state(record), records.progress(record)]
    return "  ".join(part for part in parts if part)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" if line else "" for line in text.splitlines()) + "\n"


def _shell(command: Command) -> str:
    """A line that does the same in this shell: variables that it has already are left out."""
    added = {n: v for n, v in command.environment.items() if os.environ.get(n) != v}
    return " ".join(
        [*(f"{name}={shlex.quote(value)}" for name, value in added.items()), shlex.join(command.arguments)]
    )
