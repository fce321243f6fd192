"""The record of a run's memory, without a run."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from atomas.training import memory
from atomas.training.memory import TOLD_AFTER, MemoryReport


class _Plan:
    """Stands in for that of a session."""

    peak = 2**20

    def lines(self) -> list[str]:
        return ["weights 1 MiB"]

    def as_dict(self) -> dict[str, int]:
        return {"peak_bytes": self.peak}


def _session(folder: Path, rank: int = 0) -> Any:
    return SimpleNamespace(
        placement=SimpleNamespace(rank=rank),
        run=SimpleNamespace(attempt_path=folder),
        step=0,
        device=torch.device("cpu"),
        config=SimpleNamespace(training=SimpleNamespace(max_steps=9)),
    )


def _train(report: MemoryReport) -> None:
    for _ in range(TOLD_AFTER):
        report._session.step += 1
        report.after_step()


@pytest.fixture(autouse=True)
def _without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "plan_of_run", lambda session, steps: _Plan())
    monkeypatch.setattr(memory, "held_bytes", lambda session: {"parameters": 7})


def test_a_disk_that_is_full_by_then_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    report = MemoryReport(_session(tmp_path))
    planned = (tmp_path / "memory.json").read_text()

    def full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(memory, "write_json", full)
    _train(report)
    assert caplog.messages == [
        f"the memory of this attempt could not be written down: [Errno 28] No space left on device: "
        f"'{tmp_path / 'memory.json'}'"
    ]
    assert (tmp_path / "memory.json").read_text() == planned


def test_what_was_measured_is_written_beside_the_plan(tmp_path: Path) -> None:
    report = MemoryReport(_session(tmp_path))
    _train(report)
    measured = json.loads((tmp_path / "memory.json").read_text())["measured"]
    assert measured["steps"] == TOLD_AFTER
    assert measured["planned_bytes"] == _Plan.peak
    assert measured["peak_bytes"] >= 7


def test_only_rank_0_writes(tmp_path: Path) -> None:
    report = MemoryReport(_session(tmp_path, rank=1))
    _train(report)
    assert list(tmp_path.iterdir()) == []
