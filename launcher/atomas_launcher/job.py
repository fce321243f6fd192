"""What is to run, and what a back end makes of it: files, commands, environment.

Nothing here reads the machine or the clock, so that a back end is a pure function of a job and a profile and its
output can be compared with a file.
"""

import re
import signal
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from atomas_launcher.errors import LaunchError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One command, as many processes of it as there are GPUs, and where its files lie."""

    arguments: tuple[str, ...]
    """What follows `python -m atomas`, such as ("train", "--config", "x.yaml")."""
    name: str = "atomas"
    """What the scheduler shows; the run's name."""
    identifier: str = "0"
    """Other than that of any other job: names files and objects, and decides the port where no scheduler does."""
    nodes: int = 1
    """Hosts."""
    gpus_per_node: int = 1
    """Processes of one host; each has one GPU, or none where the profile's device is the CPU."""
    folder: Path
    """Absolute folder for the files of this start; on a cluster every node sees it."""
    working_directory: Path
    """Absolute folder in which the command runs; relative paths in its arguments start there."""
    run_directory: Path | None = None
    """Absolute folder of the run, for KILL and the logs; None where the command has no run."""
    python: str = "python3"
    """Interpreter on the nodes, or in the container."""
    inherited: Mapping[str, str] = field(default_factory=dict)
    """Variables of the submitting shell that matter to training; the profile's win over them."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables given for this job; they win over the profile's."""
    time_limit: int | None = None
    """Seconds."""
    array: str = ""
    """Slurm's job array, such as 1-10%1: a chain whose members continue the same run."""
    exclude: tuple[str, ...] = ()
    """Nodes that are not to be used."""
    restarts: int = 0
    """How often the job is started again after a failure."""
    preflight: bool = False
    """Check every node first, and leave out those that are not well."""
    user: str = ""
    """UID:GID that files in a Docker container are written as."""

    def __post_init__(self) -> None:
        """Refuse what no back end could start."""
        for what, number in (("nodes", self.nodes), ("GPUs per node", self.gpus_per_node)):
            if number < 1:
                raise LaunchError(f"{what}: {number}, and at least 1 is needed")
        if self.restarts and self.run_directory is None:
            raise LaunchError(
                "restarts need a run, whose failures can be told apart: give --run-directory DIR"
            )
        if not self.arguments:
            raise LaunchError("no command: give it after --, such as -- train --config FILE")
        texts = [self.name, str(self.folder), str(self.working_directory), self.python, *self.arguments]
        check_no_control_characters(*texts, *self.environment.values())
        check_variable_names(*self.environment)
        if self.array and not re.fullmatch(r"[0-9,:%-]+", self.array):
            raise LaunchError(f"array {self.array!r} is not of the form 1-10%1")

    @property
    def world_size(self) -> int:
        """Processes of the job."""
        return self.nodes * self.gpus_per_node

    @property
    def port(self) -> int:
        """Port of rank 0 where no scheduler numbers the jobs."""
        return port_of(self.identifier)


@dataclass(frozen=True, kw_only=True)
class Command:
    """A process to start on the submitting host."""

    arguments: tuple[str, ...]
    """Never seen by a shell of ours."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to that of the submitting shell."""
    stop_signal: int = signal.SIGTERM
    """What asks it to end and leaves its ranks time to save."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """All that a back end would do."""

    files: Mapping[str, str] = field(default_factory=dict)
    """Name in the job's folder -> text. A name that ends in .sh is executable."""
    commands: tuple[Command, ...]
    """Started together. A scheduler has one, which submits; elsewhere they are the job."""


def port_of(name: str) -> int:
    """A port that follows from a job's name, so that two jobs on a host seldom meet.

    20000 - 31999, below the ports that Linux hands out to outgoing connections (32768 and up).
    """
    return 20000 + zlib.crc32(name.encode()) % 12000


def check_no_control_characters(*texts: str) -> None:
    """Raise LaunchError: a line break would end a directive or a line of a hosts' file, however it is quoted."""
    for text in texts:
        if any(ord(character) < 32 or ord(character) == 127 for character in text):
            raise LaunchError(f"{text!r} has a control character; leave it out")


def check_variable_names(*names: str) -> None:
    """Raise LaunchError for a name that no shell can export."""
    for name in names:
        if not _NAME.fullmatch(name):
            raise LaunchError(f"{name!r} is not the name of an environment variable")
