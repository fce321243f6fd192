"""`atomas launch --backend slurm` on a real Slurm of two nodes: submit, status, logs, requeue, cancel."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launcher.conftest import HOSTILE, Launch
from tests.launcher.slurm_cluster import missing_programs, slurm_cluster

pytestmark = pytest.mark.slow

PROFILE = "backend: slurm\nwarning_seconds: 60\n"


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    missing = missing_programs()
    if missing:
        pytest.skip(f"needs Slurm and munge on this host; it lacks {', '.join(missing)}")
    with slurm_cluster() as environ:
        yield environ


class Jobs:
    """Launches on that Slurm."""

    def __init__(self, launch: Launch, environ: dict[str, str]) -> None:
        self.launch, self.environ = launch, environ

    def submit(self, *options: str, run: Path, steps: int, more: tuple[str, ...] = ()) -> str:
        """The id of a new job of two nodes, one process each."""
        profile = self.launch.profile(PROFILE)
        text = self(
            "--cluster", str(profile), "--nodes=2", f"--run-directory={run}", *options, "--", "train", str(run),
            str(steps), *more,
        )  # fmt: skip
        return text.split("submitted ")[1].split(":")[0]

    def __call__(self, *options: str) -> str:
        return self.launch(*options, environ=self.environ)

    def until(self, condition: Callable[[], bool], job: str) -> None:
        end = time.monotonic() + 240
        while time.monotonic() < end:
            if condition():
                return
            time.sleep(0.5)
        raise TimeoutError(f"{self('status', job)}\n{self('logs', job)}")

    def signal(self, job: str, *options: str) -> None:
        subprocess.run(
            ["scancel", *options, job.partition("-")[2]],
            env=self.launch.environment(self.environ),
            check=True,
        )

    def control(self, *options: str) -> None:
        subprocess.run(["scontrol", *options], env=self.launch.environment(self.environ), check=True)

    def state(self, job: str) -> str:
        return self("status", job)


@pytest.fixture
def jobs(launch: Launch, slurm: dict[str, str]) -> Jobs:
    return Jobs(launch, slurm)


def step(run: Path) -> int:
    """How far rank 0 is."""
    path = run / "step_0"
    return int(path.read_text(encoding="utf-8") or 0) if path.exists() else 0


def test_a_job_with_hostile_names(jobs: Jobs) -> None:
    run = jobs.launch.folder / "odd \"name\" $(touch pwned) 'x' #"
    value = "$(touch pwned) `touch pwned` 'a' \"b\""
    job = jobs.submit(f"--env=ODD={value}", "--env=PLAIN=1", run=run, steps=3, more=HOSTILE)
    jobs.until(lambda: "COMPLETED" in jobs.state(job), job)
    ranks = [json.loads((run / f"rank_{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    assert [each["rank"] for each in ranks] == [0, 1]
    assert {each["world_size"] for each in ranks} == {2}
    assert {each["launcher"] for each in ranks} == {"slurm"}
    for each in ranks:
        assert tuple(each["arguments"]) == HOSTILE
        assert each["environment"]["ODD"] == value
        assert each["environment"]["NCCL_SOCKET_IFNAME"] == f"={each['environment']['GLOO_SOCKET_IFNAME']}"
    assert "rank 0 of 2" in jobs("logs", job)
    assert "attempt 1, step 3" in jobs.state(job)
    assert not list(jobs.launch.folder.rglob("pwned"))


def test_a_warning_saves_and_requeues(jobs: Jobs) -> None:
    """What Slurm does before the time limit; the job then continues under its own number, in the same log."""
    run = jobs.launch.run
    job = jobs.submit(run=run, steps=60)
    jobs.until(lambda: step(run) > 3, job)
    jobs.signal(job, "--batch", "--signal=USR1")
    jobs.until(lambda: "BeginTime" in jobs.state(job), job)
    # Slurm waits two minutes before it starts a requeued job
    jobs.control("update", f"JobId={job.partition('-')[2]}", "StartTime=now")
    jobs.until(lambda: (run / "attempts" / "2").exists() and step(run) == 60, job)
    jobs.until(lambda: "COMPLETED" in jobs.state(job), job)
    output = jobs("logs", job)
    assert "rank 0 saved at step" in output
    assert "rank 1 saved at step" in output
    assert output.count("rank 0 of 2") == 2


def test_cancel_ends_the_job_and_lets_it_save(jobs: Jobs) -> None:
    run = jobs.launch.run
    job = jobs.submit("--env=STAND_IN_SAVES=4", run=run, steps=2000)
    jobs.until(lambda: step(run) > 3, job)
    assert "RUNNING" in jobs.state(job)
    jobs("cancel", job)
    jobs.until(lambda: "CANCELLED" in jobs.state(job), job)
    jobs.until(lambda: "rank 1 saved at step" in jobs("logs", job), job)
    assert "rank 0 saved at step" in jobs("logs", job)
    assert not (run / "attempts" / "2").exists()


def test_a_kill_file_is_not_requeued(jobs: Jobs) -> None:
    run = jobs.launch.run
    job = jobs.submit(run=run, steps=2000)
    jobs.until(lambda: step(run) > 3, job)
    (run / "KILL").touch()
    jobs.until(lambda: "FAILED, exit code 75" in jobs.state(job), job)
    assert not (run / "attempts" / "2").exists()


def test_an_array_is_a_chain(jobs: Jobs) -> None:
    run = jobs.launch.run
    job = jobs.submit("--array=1-2%1", run=run, steps=60)
    jobs.until(lambda: step(run) > 3, job)
    jobs.signal(f"slurm-{job.partition('-')[2]}_1", "--batch", "--signal=USR1")
    jobs.until(lambda: step(run) == 60, job)
    assert (run / "attempts" / "2").exists()


def test_a_node_that_is_not_well_is_left_out(jobs: Jobs) -> None:
    """The job is requeued without it, under its own number."""
    run = jobs.launch.run
    profile = jobs.launch.profile(PROFILE)
    text = jobs(
        "--cluster", str(profile), f"--run-directory={run}", "--preflight", "--env=UNWELL=127.0.0.1", "--", "train",
        str(run), "3",
    )  # fmt: skip
    job = text.split("submitted ")[1].split(":")[0]
    number = job.partition("-")[2]
    jobs.until(lambda: "BeginTime" in jobs.state(job), job)
    assert "preflight: not well, and left out from now on: 127.0.0.1" in jobs("logs", job)
    jobs.control("update", f"JobId={number}", "StartTime=now")
    jobs.until(lambda: "COMPLETED" in jobs.state(job), job)
    (found,) = [json.loads(path.read_text(encoding="utf-8")) for path in run.glob("rank_*.json")]
    assert found["environment"]["SLURMD_NODENAME"] == "127.0.0.2"


def test_a_step_in_an_allocation(jobs: Jobs) -> None:
    run = jobs.launch.run
    profile = jobs.launch.profile("backend: srun\n")
    command = jobs.launch.command(
        "--cluster",
        str(profile),
        "--nodes=2",
        f"--run-directory={run}",
        "--",
        "train",
        str(run),
        "3",
        *HOSTILE,
    )
    subprocess.run(
        ["salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1", *command], cwd=jobs.launch.folder, check=True,
        env=jobs.launch.environment(jobs.environ), timeout=60,
    )  # fmt: skip
    ranks = [json.loads((run / f"rank_{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    assert [(each["rank"], each["world_size"], each["launcher"]) for each in ranks] == [
        (0, 2, "slurm"),
        (1, 2, "slurm"),
    ]
    assert tuple(ranks[1]["arguments"]) == HOSTILE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_ranks_of_a_step_have_time_to_save(jobs: Jobs, number: int) -> None:
    """A launch within an allocation is told to stop."""
    run, profile = jobs.launch.run, jobs.launch.profile("backend: srun\n")
    command = jobs.launch.command(
        "--cluster", str(profile), "--nodes=2", f"--run-directory={run}", "--env=STAND_IN_SAVES=4", "--", "train",
        str(run), "2000",
    )  # fmt: skip
    environ = jobs.launch.environment(jobs.environ)
    # exec: the signal is for the launch and not for salloc
    tell = ["bash", "-c", 'echo $$ >pid; exec "$@"', "launch", *command]
    allocation = subprocess.Popen(
        ["salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1", *tell], cwd=jobs.launch.folder, env=environ,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    end = time.monotonic() + 60
    while step(run) < 3 or not (run / "step_1").exists():
        assert time.monotonic() < end
        time.sleep(0.1)
    os.kill(int((jobs.launch.folder / "pid").read_text()), number)
    output, _ = allocation.communicate(timeout=60)
    assert "rank 0 saved" in output
    assert "rank 1 saved" in output
    assert allocation.returncode == 75


def test_a_failure_is_started_again_within_its_budget(jobs: Jobs) -> None:
    """Rank 0 of the stand-in fails where its step file holds no number; mended, the job goes on."""
    run = jobs.launch.run
    run.mkdir(parents=True)
    (run / "step_0").write_text("broken", encoding="utf-8")
    job = jobs.submit("--restarts=1", run=run, steps=3)
    jobs.until(lambda: "BeginTime" in jobs.state(job), job)
    assert "failed (1): started again" in jobs("logs", job)
    (run / "step_0").unlink()
    jobs.control("update", f"JobId={job.partition('-')[2]}", "StartTime=now")
    jobs.until(lambda: "COMPLETED" in jobs.state(job), job)
