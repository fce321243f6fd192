"""Training runs of several processes, started rank by rank, so that each one's end can be seen."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.ranks import LAUNCHER_VARIABLES, free_port
from tests.training.conftest import SMALL, losses

STEPS = 6
STRIKES_AT = 4
"""The batch at which the fault comes; the checkpoint before it is that of step 2."""
TIMEOUT = 60
"""Seconds that a collective may take; the start-up of a test on a busy machine stays below."""
SILENCE = 20
"""A busy machine may keep a process's threads waiting for some seconds. A broken connection is noticed at once."""
SLACK = 40
"""Seconds beyond the limit: exchanges with the store, last words, and a busy machine."""


@dataclass
class Job:
    """The processes of one run, by rank; each has its own group, and none outlives the test."""

    processes: list["subprocess.Popen[str]"]
    run: Path

    def wait(self, *, but: Sequence[int] = (), seconds: float = 240) -> list[float]:
        """Seconds after which each rank ended, from the first that did; ranks in `but` are not waited for."""
        ends: dict[int, float] = {}
        deadline = time.monotonic() + seconds
        waited = [rank for rank in range(len(self.processes)) if rank not in but]
        while len(ends) < len(waited):
            assert time.monotonic() < deadline, f"ranks {set(waited) - set(ends)} go on; {self.errors()}"
            for rank in waited:
                if rank not in ends and self.processes[rank].poll() is not None:
                    ends[rank] = time.monotonic()
            time.sleep(0.1)
        return [ends[rank] - min(ends.values()) for rank in waited]

    def codes(self) -> list[int | None]:
        """Exit codes by rank; None while it runs."""
        return [process.poll() for process in self.processes]

    def errors(self) -> str:
        return "\n".join(self.stderr(rank)[-1500:] for rank in range(len(self.processes)))

    def stderr(self, rank: int) -> str:
        return (self.run.parent / f"{self.run.name}.stderr_{rank}").read_text()

    def log(self, rank: int, attempt: int = 1) -> str:
        return (self.run / f"attempts/{attempt}/rank_{rank:04d}.log").read_text()

    def last_line(self, rank: int) -> str:
        """What the rank's log ends with."""
        return self.log(rank).splitlines()[-1]

    def flight(self, rank: int) -> dict[str, object]:
        return json.loads((self.run / f"attempts/1/flight_rank_{rank:04d}.json").read_text())


@dataclass
class Bench:
    """Starts jobs in a folder with a corpus."""

    folder: Path
    faults: str = "tests.distributed.faulty_rank"
    """Module that brings a fault."""

    def command(self, name: str, *options: str, fault: Sequence[object] = ()) -> list[str]:
        module = [self.faults, *map(str, fault)] if fault else ["atomas"]
        return [
            sys.executable, "-m", *module, "train", *SMALL, f"--data.corpus={self.folder / 'corpus'}",
            f"--run.output_dir={self.folder / 'runs'}", f"--run.name={name}", f"--training.max_steps={STEPS}",
            "--checkpoint.every=2", f"--run.collective_timeout_seconds={TIMEOUT}",
            f"--run.silence_timeout_seconds={SILENCE}", *options,
        ]  # fmt: skip

    @contextmanager
    def job(
        self,
        name: str,
        *options: str,
        ranks: int = 2,
        fault: Sequence[object] = (),
        environ: Mapping[str, str] | None = None,
        places: Sequence[Mapping[str, str]] | None = None,
        prefixes: Sequence[Sequence[str]] | None = None,
    ) -> Iterator[Job]:
        """One process per rank, placed by torch's variables.

        Args:
            name: the run's.
            options: of `atomas train`.
            ranks: how many.
            fault: what the module `faults` is told.
            environ: variables of all ranks.
            places: variables of each rank.
            prefixes: what stands before each rank's command.
        """
        clean = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER_VARIABLES)}
        clean |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        clean |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), **(environ or {})}
        job = Job(processes=[], run=self.folder / "runs" / name)
        job.run.parent.mkdir(exist_ok=True)
        try:
            for rank in range(ranks):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank), **(places[rank] if places else {})}
                command = [*(prefixes[rank] if prefixes else ()), *self.command(name, *options, fault=fault)]
                with (job.run.parent / f"{name}.stderr_{rank}").open("w") as errors:
                    job.processes.append(
                        subprocess.Popen(
                            command,
                            env={**clean, **place},
                            text=True,
                            stdout=subprocess.DEVNULL,
                            stderr=errors,
                            start_new_session=True,
                        )
                    )
            yield job
        finally:
            for process in job.processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def train(self, name: str, *options: str, ranks: int = 2) -> list[float]:
        """Losses of a run, or of its continuation, in which nothing goes wrong."""
        with self.job(name, *options, ranks=ranks) as job:
            job.wait()
            assert job.codes() == [0] * ranks, job.errors()
        return losses(job.run)
