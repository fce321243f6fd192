"""`atomas launch --backend pbs`: the server is stood in for (pbs_server.py), the job script and mpirun are real."""

import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launcher.conftest import HOSTILE, Launch
from tests.launcher.test_mpi import version
from tests.launcher.test_starts import ranks

MPI = "{OMPI_ALLOW_RUN_AS_ROOT: '1', OMPI_ALLOW_RUN_AS_ROOT_CONFIRM: '1', OMPI_MCA_rmaps_base_oversubscribe: '1'}"


class Server:
    """Submits, and looks after what it has submitted."""

    def __init__(self, launch: Launch, jobs: Path, environ: dict[str, str]) -> None:
        self.launch, self.jobs, self.environ = launch, jobs, environ

    def submit(self, *options: str, steps: int, more: tuple[str, ...] = (), profile: str = "") -> str:
        """The id of a new job of two processes."""
        cluster = self.launch.profile(f"backend: pbs\nmpi: openmpi\nenvironment: {MPI}\n{profile}")
        run = str(self.launch.run)
        text = self(
            "--cluster", str(cluster), "--gpus-per-node=2", f"--run-directory={run}", *options, "--", "train", run,
            str(steps), *more,
        )  # fmt: skip
        return text.split("submitted ")[1].split(":")[0]

    def __call__(self, *options: str) -> str:
        return self.launch(*options, environ=self.environ)

    def until(self, condition: Callable[[], object], job: str) -> None:
        end = time.monotonic() + 60
        while not condition():
            if time.monotonic() > end:
                outputs = [path.read_text() for path in self.launch.run.rglob("*.out")]
                raise TimeoutError(f"{self('status', job)}\n{outputs}")
            time.sleep(0.1)

    def trains(self) -> bool:
        """Whether both ranks have begun."""
        return all((self.launch.run / f"step_{rank}").exists() for rank in (0, 1))


@pytest.fixture
def pbs(launch: Launch, tmp_path: Path) -> Server:
    if "Open MPI" not in version("mpirun"):
        pytest.skip("needs Open MPI on this host")
    jobs, programs = tmp_path / "jobs", tmp_path / "programs"
    jobs.mkdir()
    programs.mkdir()
    for name in ("qsub", "qstat", "qdel"):
        words = shlex.join([sys.executable, str(Path(__file__).with_name("pbs_server.py")), str(jobs), name])
        (programs / name).write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="utf-8")
        (programs / name).chmod(0o755)
    path = launch.environment()["PATH"]
    environ = {"PATH": f"{programs}:{path}"}
    assert shutil.which("qsub", path=environ["PATH"])
    return Server(launch, jobs, environ)


def test_a_job_with_hostile_names(pbs: Server) -> None:
    value = "$(touch pwned) `touch pwned` 'a' \"b\""
    job = pbs.submit(f"--env=ODD={value}", "--name=a'b $(touch pwned)", steps=3, more=HOSTILE)
    pbs.until(lambda: "job_state = F; Exit_status = 0" in pbs("status", job), job)
    found = ranks(pbs.launch.run)
    assert [(each["rank"], each["world_size"], each["launcher"]) for each in found] == [
        (0, 2, "openmpi"),
        (1, 2, "openmpi"),
    ]
    assert {(each["address"], each["port"]) for each in found} == {("localhost", found[0]["port"])}
    assert [tuple(each["arguments"]) for each in found] == [HOSTILE, HOSTILE]
    assert {each["environment"]["ODD"] for each in found} == {value}
    assert "rank 0 of 2" in pbs("logs", job)
    assert not list(pbs.launch.folder.rglob("pwned"))


@pytest.mark.slow
def test_a_job_warns_itself_saves_and_submits_itself_again(pbs: Server) -> None:
    """One minute of limit, 58 s of which are the warning."""
    job = pbs.submit("--time=1", steps=60, profile="warning_seconds: 58\n")
    pbs.until(lambda: len(list(pbs.jobs.iterdir())) == 2, job)
    assert "Exit_status = 75" in pbs("status", job) or "job_state = R" in pbs("status", job)
    (launched,) = (pbs.launch.run / "launch").iterdir()
    pbs.until(lambda: len(list(launched.glob("pbs-*.out"))) == 2, job)
    first, second = sorted(launched.glob("pbs-*.out"))
    assert "rank 0 saved at step" in first.read_text(encoding="utf-8")
    pbs.until(lambda: "rank 0 of 2" in second.read_text(encoding="utf-8"), job)
    (pbs.launch.run / "KILL").touch()
    pbs.until(lambda: all((each / "status").exists() for each in pbs.jobs.iterdir()), job)


def test_cancel_lets_the_run_save_and_submits_nothing(pbs: Server) -> None:
    job = pbs.submit("--env=STAND_IN_SAVES=3", steps=2000)
    pbs.until(pbs.trains, job)
    assert "asked qdel to end" in pbs("cancel", job)
    pbs.until(lambda: "Exit_status" in pbs("status", job), job)
    assert "rank 1 saved at step" in pbs("logs", job)
    assert len(list(pbs.jobs.iterdir())) == 1


@pytest.mark.slow
def test_a_failure_is_submitted_again_within_its_budget(pbs: Server) -> None:
    """Rank 0 of the stand-in fails where its step file holds no number."""
    pbs.launch.run.mkdir(parents=True)
    (pbs.launch.run / "step_0").write_text("broken", encoding="utf-8")
    job = pbs.submit("--restarts=1", steps=3)
    pbs.until(lambda: len(list(pbs.jobs.iterdir())) == 2, job)
    pbs.until(lambda: all((each / "status").exists() for each in pbs.jobs.iterdir()), job)
    (record,) = (pbs.launch.run / "launch").glob("*/failures.jsonl")
    failures = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    assert [each["status"] for each in failures] == [1, 1]
    assert len(list(pbs.jobs.iterdir())) == 2
