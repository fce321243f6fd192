"""Do what a back end rendered: write the files, submit, or run the processes until all have ended."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from atomas_launcher.errors import LaunchError
from atomas_launcher.job import Command, Rendered
from atomas_launcher.placement import launcher_variables
from atomas_launcher.process import RESUME_EXIT_CODE

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
PATIENCE = 60.0
"""Seconds that the others have once one process has ended well."""
GRACE = 30.0
"""Seconds between asking a process to end and ending it."""


def write_files(rendered: Rendered, folder: Path) -> None:
    """Write all files into the job's folder, which must be new.

    Raises:
        LaunchError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True)
        for name, text in rendered.files.items():
            (folder / name).write_text(text, encoding="utf-8")
            if name.endswith(".sh"):
                (folder / name).chmod(0o755)
    except OSError as error:
        raise LaunchError(f"{folder} cannot be written: {error}") from None


def submit(command: Command) -> str:
    """Run a scheduler's command; what it wrote, without the end of line.

    Raises:
        LaunchError: it is not installed, or refuses.
    """
    program = command.arguments[0]
    try:
        done = subprocess.run(
            command.arguments,
            env={**os.environ, **command.environment},
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise LaunchError(
            f"there is no {program} on this host; try --dry-run, or another --backend"
        ) from None
    if done.returncode:
        raise LaunchError(f"{program} refused: {' '.join((done.stderr or done.stdout).split())}")
    return done.stdout.strip()


def run_together(commands: Sequence[Command]) -> tuple[int, bool]:
    """Start all, hand signals on to each, and end the others where one fails.

    The first signal asks for an end after a save, as the command understands it; a second one goes on as it is.

    Returns:
        The exit code of the first that failed, 128 + N after signal N, else 0; and whether an end was asked for.
    """
    # this launcher may itself stand in some other job, whose variables would contradict the processes' own; those of
    # an allocation stay, because srun and mpirun find their nodes by them
    outer = {name for name in launcher_variables() if not name.startswith("SLURM_")}
    clean = {name: value for name, value in os.environ.items() if name not in outer}
    processes: list[subprocess.Popen[bytes]] = []

    asked: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        is_first = not asked
        asked.append(number)
        for process, command in zip(processes, commands, strict=False):  # whoever asks twice means it
            _send([process], command.stop_signal if is_first else number)

    # under `nohup` SIGHUP stays ignored, and the commands inherit that
    heard = [
        one for one in FORWARDED_SIGNALS if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, forward) for number in heard}
    try:
        for command in commands:
            processes.append(_start(command, clean))
        return _wait(processes), bool(asked)
    finally:
        _send(processes, signal.SIGKILL)
        for process in processes:
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(command: Command, environ: dict[str, str]) -> "subprocess.Popen[bytes]":
    try:
        # in a group of its own, so that a terminal's Ctrl-C reaches it once, from us
        return subprocess.Popen(
            command.arguments,
            env={**environ, **command.environment},
            stdin=subprocess.DEVNULL,
            process_group=0,
        )
    except FileNotFoundError:
        raise LaunchError(f"there is no {command.arguments[0]} on this host") from None


def _wait(processes: Sequence["subprocess.Popen[bytes]"]) -> int:
    """Until all have ended; the first failure counts."""
    failed: int | None = None
    asked_to_end: float | None = None
    first_end: float | None = None
    while True:
        codes = [process.poll() for process in processes]
        now = time.monotonic()
        ended = [code for code in codes if code is not None]
        if failed is None:
            failed = next((code for code in ended if code), None)
        if len(ended) == len(codes):
            return 0 if failed is None else failed if failed > 0 else 128 - failed
        if ended and first_end is None:
            first_end = now
        is_failure = failed not in (None, RESUME_EXIT_CODE)
        is_late = first_end is not None and now - first_end > PATIENCE
        if asked_to_end is None and (is_failure or is_late):
            asked_to_end = now
            _send(processes, signal.SIGTERM)
            _send(processes, signal.SIGCONT)  # one that is stopped hears nothing else
        if asked_to_end is not None and now - asked_to_end > GRACE:
            _send(processes, signal.SIGKILL)
        time.sleep(0.1)


def _send(processes: Sequence["subprocess.Popen[bytes]"], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)
