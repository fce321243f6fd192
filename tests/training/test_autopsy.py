"""The end of runs, read from folders made by hand; `tests/distributed/test_failures.py` reads those of real ones."""

import json
from pathlib import Path

import pytest

from atomas.cli import main
from atomas.distributed.flight_recorder import FlightRecorder
from atomas.errors import AtomasError
from atomas.phases import observed_by, phase
from atomas.training.autopsy import examine


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two ranks, six steps of which four are done, and a checkpoint of step 2."""
    attempt = tmp_path / "attempts" / "1"
    attempt.mkdir(parents=True)
    for rank in range(2):
        (attempt / f"rank_{rank:04d}.log").write_text(f"12:00:00 rank {rank} INFO begun\n")
    lines = [json.dumps({"kind": "train", "step": step, "loss": 1.0}) + "\n" for step in range(1, 5)]
    (attempt / "metrics.jsonl").write_text("".join(lines) + '{"kind": "train", "step": 5, "lo')
    (tmp_path / "config.yaml").write_text("training:\n  max_steps: 6\n")
    (tmp_path / "checkpoints/step_00000002").mkdir(parents=True)
    (tmp_path / "checkpoints/step_00000002/manifest.json").touch()
    return tmp_path


def fly(run: Path, rank: int, name: str, error: Exception | None, reason: str, guilty: list[int]) -> None:
    recorder = FlightRecorder(rank=rank)
    recorder.begin_step(5)
    with observed_by(recorder), phase(name):
        recorder.dump(run / "attempts/1", reason, guilty=guilty, error=error)


@pytest.mark.parametrize(
    ("where", "reason", "cause"),
    [
        ("backward", "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "out of memory"),
        ("checkpoint", "OSError: [Errno 28] No space left on device", "disk"),
        ("data", "ValueError: shard 7 is broken", "data"),
        ("encoder", "ValueError: shapes", "error"),
    ],
)
def test_the_rank_that_failed_tells(run: Path, where: str, reason: str, cause: str) -> None:
    fly(run, 1, where, ValueError(), reason, [1])
    fly(run, 0, "communication", None, f"rank 1 (n2) failed in step 5, {where}: {reason}", [1])
    found = examine(run)
    assert (found.outcome, found.cause, found.guilty) == ("failed", cause, [1])
    assert found.story.endswith(f"step 5, {where}: {reason}")
    assert (found.last_step, found.checkpoint, found.steps_lost) == (4, "step_00000002", 2)


@pytest.mark.parametrize(
    ("reason", "guilty", "cause"),
    [
        ("rank 1 (n2) has not been seen for 31 s; it was last heard of in step 5, data", [1], "silent rank"),
        ("rank 1 (n2) is in step 5, data, and the others have waited 61 s; rank 0 was in vote", [1], "hang"),
        ("no rank goes on for 61 s: rank 0 (n1) is in step 5, vote", [], "hang"),
        ("connections broke although every rank is alive: rank 0 (n1) in step 5, vote: reset", [], "network"),
    ],
)  # fmt: skip
def test_others_tell_of_a_rank_that_cannot(run: Path, reason: str, guilty: list[int], cause: str) -> None:
    fly(run, 0, "communication", None, reason, guilty)
    found = examine(run)
    assert (found.cause, found.guilty, found.story) == (cause, guilty, reason)
    assert found.ranks == {0: reason, 1: "12:00:00 rank 1 INFO begun"}


def test_ends_without_a_flight(run: Path) -> None:
    assert examine(run).outcome == "unknown"
    assert "no sign of an end" in examine(run).story
    (run / "attempts/1/rank_0000.log").write_text("12:00:00 rank 0 WARNING stopped after step 4 and saved\n")
    assert examine(run).outcome == "stopped"
    (run / "config.yaml").write_text("training:\n  max_steps: 4\n")
    assert examine(run).outcome == "done"


def test_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fly(run, 1, "data", ValueError(), "ValueError: shard 7 is broken", [1])
    main(["doctor", str(run)])
    told = capsys.readouterr().out
    assert "attempt 1: failed (data)" in told
    assert "step 5, data: ValueError: shard 7 is broken" in told
    assert "last step 4; the next attempt continues step_00000002, steps lost: 2" in told
    main(["doctor", str(run), "--json"])
    assert json.loads(capsys.readouterr().out)["guilty"] == [1]
    with pytest.raises(AtomasError, match="has no attempt 7, but 1"):
        examine(run, 7)
    with pytest.raises(AtomasError, match="is not the folder of a run"):
        examine(run / "attempts")
