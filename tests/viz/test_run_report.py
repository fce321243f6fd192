"""A run on one page."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from atomas.cli import main
from atomas.viz.run_report import step_split

SPLIT = {"data": 0.25, "encoder": 1.0, "interaction": 0.0, "other": 0.75}


def _step(number: int, **values: Any) -> dict[str, Any]:
    measured = dict.fromkeys(
        (
            "pairs_per_second",
            "tokens_per_second",
            "padding_fraction",
            "mfu",
            "hfu",
            "peak_memory_mb",
            "step_seconds",
        ),
        0.5 * number,
    )
    seconds = {f"seconds/{name}": value for name, value in SPLIT.items()}
    return {"kind": "train", "step": number, "loss/lm": 3.0 / number, **measured, **seconds, **values}


@pytest.mark.parametrize("steps", [1, 100])
def test_report_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int) -> None:
    attempt = tmp_path / "run <1>/attempts/1"
    attempt.mkdir(parents=True)
    records = [_step(number, **{"seconds/data_max": 9.0}) for number in range(1, steps + 1)]
    records.append({"kind": "validation", "step": steps, "text_to_molecule/recall_at_1": 0.5, "seconds": 1.0})
    (attempt / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (attempt / "env.json").write_text(json.dumps({"world_size": 2, "device_name": "a device"}))
    main(["report", str(tmp_path / "run <1>")])
    written = Path(capsys.readouterr().out.strip())
    assert written == tmp_path / "run <1>/report.html"
    page = written.read_text()
    assert "<h1>run &lt;1&gt;</h1>" in page
    assert f"{steps} steps to step {steps}; 2 ranks on a device" in page
    assert re.findall(r"<td>(\w+)</td><td>([\d.]+) s</td><td>([\d.]+)%</td>", page) == [
        ("encoder", "1.0000", "50.0"), ("other", "0.7500", "37.5"), ("data", "0.2500", "12.5"),
    ]  # fmt: skip
    picture = ET.fromstring(page[page.index("<svg") : page.index("</svg>") + len("</svg>")])
    assert picture.tag.endswith("svg")


def test_phases_without_time_and_the_slowest_rank_are_no_part_of_the_split() -> None:
    split = step_split(
        [_step(1, **{"seconds/data_max": 9.0}), {"kind": "checkpoint", "step": 1, "seconds": 1}]
    )
    assert list(split) == ["data", "encoder", "other"]


def test_a_folder_without_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["report", str(tmp_path)])
    assert error.value.code == 2
    assert "has no metrics of a step" in capsys.readouterr().err
