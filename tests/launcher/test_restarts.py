"""A job that failed is started again within its budget, and not where it fails twice alike."""

import json
from pathlib import Path

import pytest

from atomas_launcher.restarts import Failure, diagnose, is_failure, main, obstacle, wait_seconds
from tests.launcher.conftest import Launch

DATA = {"last_step": 7, "cause": "data", "guilty": [1], "story": "rank 1, step 7, data: ValueError"}


def failure(step: int, cause: str = "data", rank: int = 1) -> Failure:
    return Failure(status=1, step=step, cause=cause, guilty=(rank,), story="rank 1, data")


def test_budget() -> None:
    failures = [failure(step) for step in (3, 9, 12)]
    assert obstacle(failures, 3) is None
    assert obstacle(failures, 2) == "it has been restarted 2 times; the last failure: rank 1, data"


def test_twice_alike() -> None:
    assert obstacle([failure(7), failure(7)], 9) == "it failed twice alike, after step 7: rank 1, data"
    assert obstacle([failure(7), failure(8)], 9) is None
    assert obstacle([failure(7), failure(7, cause="disk")], 9) is None
    assert obstacle([failure(7), failure(7, rank=0)], 9) is None
    assert obstacle([failure(7, cause=""), failure(7, cause="")], 9) is None, "nothing is known of either"


def test_waits_double() -> None:
    assert [wait_seconds(number) for number in (1, 2, 3, 9)] == [5, 10, 20, 300]


@pytest.mark.parametrize(
    ("status", "expected"), [(0, False), (2, False), (75, False), (76, True), (137, True)]
)
def test_what_is_a_failure(status: int, expected: bool) -> None:
    assert is_failure(status) is expected


def test_a_doctor_that_cannot_say(tmp_path: Path) -> None:
    for command in (["no-such-program"], ["false"], ["echo", "no json"], ["echo", "{}"]):
        assert diagnose(1, command) == Failure(status=1)
    assert diagnose(1, ["echo", json.dumps(DATA)]).story == "rank 1, step 7, data: ValueError"


def test_the_decision_of_a_job_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "failures.jsonl"
    doctor = ["echo", json.dumps(DATA)]

    def decide(status: int) -> object:
        with pytest.raises(SystemExit) as ended:
            main(["--budget=5", f"--status={status}", f"--record={record}", "--", *doctor])
        return ended.value.code

    assert decide(2) == 1
    assert not record.exists()
    assert decide(137) == 0
    assert decide(137) == 1
    assert "not started again: it failed twice alike, after step 7" in capsys.readouterr().out


def test_a_local_job(launch: Launch) -> None:
    """The stand-in fails where its step file holds no number; a doctor that says so twice ends it."""
    launch.run.mkdir(parents=True)
    (launch.run / "step_0").write_text("broken", encoding="utf-8")
    (launch.folder / "autopsy.json").write_text(json.dumps(DATA), encoding="utf-8")
    job = ("--cluster", str(launch.profile("")), f"--run-directory={launch.run}", "--restarts=3")
    output = launch(*job, "--", "train", str(launch.run), "3", code=1)
    assert "failed: rank 1, step 7, data: ValueError; started again in 5 s" in output
    assert "not started again: it failed twice alike, after step 7: rank 1, step 7, data" in output
    assert len(list((launch.run / "attempts").iterdir())) == 2


def test_restarts_need_a_run(launch: Launch) -> None:
    assert "give --run-directory DIR" in launch("--restarts=3", "--dry-run", "--", "embed", code=2)
