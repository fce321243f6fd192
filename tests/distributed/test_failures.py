"""Training runs of several processes in which a rank dies, fails or hangs, or the link between two hosts does."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from atomas.data.demo import build_demo_corpus
from atomas.distributed.watchdog import LOST_RANK_EXIT_CODE
from tests.training.conftest import SMALL, losses

STEPS = 6
STRIKES_AT = 4
"""The batch at which the fault comes; the checkpoint before it is that of step 2."""
TIMEOUT = 30
"""Seconds that a collective may take; the start-up of a test on a busy machine stays below."""
SILENCE = 6
SLACK = 15
"""Seconds beyond the limit: exchanges with the store, last words, and a busy machine."""
LAUNCHER_VARIABLES = ("SLURM_", "OMPI_", "PMI", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_", "TORCHELASTIC_")


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
        return [process.returncode for process in self.processes]

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

    def command(self, name: str, *options: str, fault: Sequence[object] = ()) -> list[str]:
        module = ["tests.distributed.faulty_rank", *map(str, fault)] if fault else ["atomas"]
        return [
            sys.executable, "-m", *module, "train", *SMALL, f"--data.corpus={self.folder / 'corpus'}",
            f"--run.output_dir={self.folder / 'runs'}", f"--run.name={name}", f"--training.max_steps={STEPS}",
            "--checkpoint.every=2", f"--run.collective_timeout_seconds={TIMEOUT}",
            f"--run.silence_timeout_seconds={SILENCE}", *options,
        ]  # fmt: skip

    @contextmanager
    def job(
        self, name: str, *options: str, ranks: int = 2, fault: Sequence[object] = (),
        prefixes: Sequence[Sequence[str]] | None = None, environ: dict[str, str] | None = None,
    ) -> Iterator[Job]:  # fmt: skip
        """One process per rank, placed by torch's variables; `prefixes` come before each rank's command."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER_VARIABLES)}
        clean |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        clean |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), **(environ or {})}
        job = Job(processes=[], run=self.folder / "runs" / name)
        job.run.parent.mkdir(exist_ok=True)
        try:
            for rank in range(ranks):
                placed = {**clean, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                prefix = prefixes[rank] if prefixes else ()
                with (job.run.parent / f"{name}.stderr_{rank}").open("w") as errors:
                    job.processes.append(
                        subprocess.Popen(
                            [*prefix, *self.command(name, *options, fault=fault)],
                            env=placed,
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


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("failures")
    build_demo_corpus(folder / "corpus", pairs=240, seed=3, workers=1)
    return Bench(folder)


@pytest.fixture(scope="module")
def undisturbed(bench: Bench) -> list[float]:
    """Losses of two ranks that nothing happens to."""
    return bench.train("undisturbed")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def place(rank: int, what: str) -> str:
    return f"rank {rank} ({socket.gethostname()}) {what}"


def test_a_killed_rank_is_named(bench: Bench) -> None:
    with bench.job("killed", fault=("kill", 1, STRIKES_AT), ranks=2) as job:
        assert max(job.wait()) < SLACK
        assert job.codes() == [LOST_RANK_EXIT_CODE, -signal.SIGKILL]
    line = job.last_line(0)
    assert "CRITICAL" in line
    assert place(1, "has not been seen for ") in line
    assert re.search("it was last in step [34], .*; rank 0 was in step 4, ", line)
    assert job.stderr(0).count("has not been seen") == 1
    assert "Traceback" not in job.stderr(0)
    assert [step["step"] for step in job.flight(0)["steps"]] == [0, 1, 2, 3, 4]  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("guilty", [0, 1])
def test_an_error_in_one_rank_is_told_on_the_other(
    bench: Bench, undisturbed: list[float], guilty: int
) -> None:
    name = f"raised_{guilty}"
    with bench.job(name, fault=("raise", guilty, STRIKES_AT)) as job:
        later = job.wait()
        codes = job.codes()
    other = 1 - guilty
    assert codes[guilty] == 1
    assert codes[other] == LOST_RANK_EXIT_CODE
    assert max(later) < SLACK
    assert "ValueError: shard 7 is\nbroken" in job.stderr(guilty)  # its own traceback
    assert place(guilty, "failed in step 4, data: ValueError: shard 7 is broken") in job.last_line(other)
    assert job.flight(guilty)["reason"] == "ValueError: shard 7 is broken"
    assert "Traceback" not in job.stderr(other)
    assert bench.train(name) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("guilty", [0, 1])
def test_a_run_continues_after_a_kill(bench: Bench, undisturbed: list[float], guilty: int) -> None:
    """Rank 0 holds the store as well."""
    name, other = f"killed_{guilty}", 1 - guilty
    with bench.job(name, fault=("kill", guilty, STRIKES_AT)) as job:
        assert max(job.wait()) < SLACK
        assert job.codes()[guilty] == -signal.SIGKILL
        assert job.codes()[other] == LOST_RANK_EXIT_CODE
    assert place(guilty, "has not been seen for ") in job.last_line(other)
    assert "CRITICAL" in job.last_line(other)
    assert bench.train(name) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("guilty", [0, 1])
def test_a_stopped_rank_counts_as_dead(bench: Bench, undisturbed: list[float], guilty: int) -> None:
    name, other = f"stopped_{guilty}", 1 - guilty
    with bench.job(name, fault=("stop", guilty, STRIKES_AT)) as job:
        stopped_at = _when_stopped(job.processes[guilty].pid)
        job.wait(but=[guilty])
        assert time.monotonic() - stopped_at < SILENCE + SLACK
        assert job.codes()[other] == LOST_RANK_EXIT_CODE
        assert place(guilty, "has not been seen for ") in job.last_line(other)
        assert f"; rank {other} was in step 4, " in job.last_line(other)
        os.kill(job.processes[guilty].pid, signal.SIGCONT)  # whoever wakes up finds that the run is over
        job.wait(seconds=60)
        assert job.codes()[guilty] == LOST_RANK_EXIT_CODE
    assert bench.train(name) == undisturbed


@pytest.mark.slow
def test_a_rank_that_sleeps_is_named_after_the_timeout(bench: Bench, undisturbed: list[float]) -> None:
    with bench.job("asleep", fault=("sleep", 1, STRIKES_AT)) as job:
        job.wait()
        assert job.codes() == [LOST_RANK_EXIT_CODE] * 2
    for rank in range(2):
        assert place(1, "is in step 4, data, and the others have waited ") in job.last_line(rank)
    waited = float(job.last_line(0).split("have waited ")[1].split(" s")[0])
    assert TIMEOUT <= waited < TIMEOUT + SLACK
    assert bench.train("asleep") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill", "sleep"])
def test_four_ranks(bench: Bench, fault: str) -> None:
    """Those who wait for a rank that is not the guilty one name the guilty one all the same."""
    with bench.job(f"four_{fault}", fault=(fault, 2, STRIKES_AT), ranks=4) as job:
        job.wait()
        expected = -signal.SIGKILL if fault == "kill" else LOST_RANK_EXIT_CODE
        assert job.codes() == [LOST_RANK_EXIT_CODE, LOST_RANK_EXIT_CODE, expected, LOST_RANK_EXIT_CODE]
    for rank in (0, 1, 3):
        assert place(2, "") in job.last_line(rank)
        assert not any(place(innocent, "") in job.last_line(rank) for innocent in (0, 1, 3))


def _when_stopped(pid: int) -> float:
    """Wait until the process is stopped."""
    deadline = time.monotonic() + 120
    while Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return time.monotonic()
