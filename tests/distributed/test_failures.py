"""Training runs of several processes in which a rank dies, fails or hangs, or the link between two hosts does."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from atomas.data.demo import build_demo_corpus
from atomas.distributed.watchdog import LOST_RANK_EXIT_CODE
from atomas.training.autopsy import examine
from tests.distributed.jobs import SILENCE, SLACK, STRIKES_AT, TIMEOUT, Bench
from tests.training.conftest import losses


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("failures")
    build_demo_corpus(folder / "corpus", pairs=240, seed=3, workers=1)
    return Bench(folder)


@pytest.fixture(scope="module")
def undisturbed(bench: Bench) -> list[float]:
    """Losses of two ranks that nothing happens to."""
    return bench.train("undisturbed")


def place(rank: int, what: str) -> str:
    return f"rank {rank} ({socket.gethostname()}) {what}"


def test_a_killed_rank_is_named(bench: Bench) -> None:
    with bench.job("killed", fault=("kill", 1, STRIKES_AT), ranks=2) as job:
        assert max(job.wait()) < SLACK
        assert job.codes() == [LOST_RANK_EXIT_CODE, -signal.SIGKILL]
    line = job.last_line(0)
    assert "CRITICAL" in line
    assert place(1, "has not been seen for ") in line
    assert "; it was last heard of in step 4, data; rank 0 was in step 4, " in line
    assert job.stderr(0).count("has not been seen") == 1
    assert "Traceback" not in job.stderr(0)
    assert [step["step"] for step in job.flight(0)["steps"]] == [0, 1, 2, 3, 4]  # type: ignore[attr-defined]
    found = examine(job.run)
    assert (found.cause, found.guilty, found.last_step, found.steps_lost) == ("silent rank", [1], 3, 1)


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
    assert "ValueError: shard 7 is\n" in job.stderr(guilty)  # its own traceback
    assert place(guilty, "failed in step 4, data: ValueError: shard 7 is broken") in job.last_line(other)
    assert job.flight(guilty)["reason"] == "ValueError: shard 7 is broken"
    assert "Traceback" not in job.stderr(other)
    assert (examine(job.run).cause, examine(job.run).guilty) == ("data", [guilty])
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
    assert (examine(job.run).cause, examine(job.run).guilty) == ("hang", [1])
    assert bench.train("asleep") == undisturbed


@pytest.mark.slow
def test_ranks_wait_for_one_that_works_longer_than_a_collective_may_take(
    bench: Bench, undisturbed: list[float]
) -> None:
    """Rank 0 alone measures the corpus, and hashes checkpoints."""
    limit = "--run.collective_timeout_seconds=20"
    with bench.job("long_lengths", "--training.max_steps=4", limit, fault=(45, 0, "lengths")) as job:
        job.wait()
        assert job.codes() == [0, 0], job.errors()
    with bench.job("long_lengths", limit, fault=(45, 0, "choose")) as job:
        job.wait()
        assert job.codes() == [0, 0], job.errors()
    assert losses(job.run) == undisturbed


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
