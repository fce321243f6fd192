"""The record of a run's memory, without a run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atomas.json_files import write_json
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
        config=SimpleNamespace(training=SimpleNamespace(max_steps=9)),
        gauge=SimpleNamespace(peak=lambda: 3 * 2**20),
    )


@pytest.fixture(autouse=True)
def _without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "plan_of_run", lambda session: _Plan())
    monkeypatch.setattr(memory, "held_bytes", lambda session: {"parameters": 7})


def test_a_disk_that_is_full_by_then_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    report = MemoryReport(_session(tmp_path))
    planned = (tmp_path / "memory.json").read_text()

    def full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(memory, "write_json", full)
    for _ in range(TOLD_AFTER):
        report.after_step()
    assert caplog.messages == [
        f"the memory of this attempt could not be written down: [Errno 28] No space left on device: "
        f"'{tmp_path / 'memory.json'}'"
    ]
    assert (tmp_path / "memory.json").read_text() == planned
    monkeypatch.setattr(memory, "write_json", write_json)
    report._session.step = 9  # the last: there is room again
    report.after_step()
    assert '"peak_bytes": 3145728' in (tmp_path / "memory.json").read_text()


def test_only_rank_0_writes(tmp_path: Path) -> None:
    report = MemoryReport(_session(tmp_path, rank=1))
    for _ in range(TOLD_AFTER):
        report.after_step()
    assert list(tmp_path.iterdir()) == []
