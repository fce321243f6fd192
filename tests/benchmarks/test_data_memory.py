"""The memory of a loader: flat where it is, and noticed where it is not."""

import json
from pathlib import Path
from typing import Any

import pytest

from atomas.benchmarks.data import memory
from atomas.cli import main


def _row(own: float) -> dict[str, Any]:
    return {
        "pairs": 1,
        "worker_own_mb": own,
        "worker_resident_mb": 100.0,
        "own_resident_mb": 90.0,
        "seconds": 1.0,
    }


def test_growth_is_of_the_second_half() -> None:
    assert memory.growth_mb([_row(own) for own in (1, 5, 6, 5, 6, 5)]) == 0
    assert memory.growth_mb([_row(own) for own in range(10)]) == 5


def test_memory_is_recorded_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "SCALE_PAIRS", 100_000)
    report = tmp_path / "memory.json"
    main(["bench", "data-memory", "--pairs", "20480", "--samples", "8", "--json", str(report)])
    content = json.loads(report.read_text())
    assert len(content["rows"]) >= 7
    assert all(0 < row["worker_own_mb"] < row["worker_resident_mb"] for row in content["rows"])
    assert content["scale"]["pairs"] == 100_000 // 256 * 256
    assert 0 < content["scale"]["order_mb"] < 1
    main(["bench", "render", str(report), "--out", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"memory.md", "memory.png"}
    monkeypatch.setattr(memory, "stream_epoch", lambda *_: [_row(own) for own in range(20)])
    with pytest.raises(SystemExit):
        main(["bench", "data-memory", "--pairs", "20480"])
    assert "memory grew by 10.0 MiB" in capsys.readouterr().err


@pytest.mark.slow
def test_five_million_pairs_take_no_more_than_the_first(tmp_path: Path) -> None:
    rows = memory.stream_epoch(tmp_path, 5_000_000, 256, 50)
    assert rows[-1]["pairs"] > 4_900_000
    assert memory.growth_mb(rows) < memory.TOLERANCE_MB
