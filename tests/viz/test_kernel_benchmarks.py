"""Pictures and tables of operator benchmarks, from made-up rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from atomas.cli import main
from atomas.viz.kernel_tables import benchmark_problems, benchmark_table, full_benchmark_table, memory_table
from atomas.viz.tables import render_page


def row(provider: str, batch: int, ms: float | None, peak: float = 1.0, **fields: Any) -> dict[str, Any]:
    status = {"status": "ok", "reason": None} if ms is not None else {}
    return {
        "op": "token_interaction",
        "provider": provider,
        "backend": provider if provider in ("native", "reference") else None,
        "mode": "full",
        "shape": {"batch": batch, "width": 768},
        "lengths": {"text": 100 * batch, "smiles": 50 * batch},
        "dtype": "float32",
        "threads": 1,
        "ms": None if ms is None else {"p20": ms * 0.9, "p50": ms, "p80": ms * 1.2},
        "peak_mb": None if ms is None else peak,
        "tflops": 0.1,
        "error": 1e-7,
        **status,
        **fields,
    }


@pytest.fixture
def report() -> dict[str, Any]:
    oom = {"status": "oom", "reason": "needs about 40.0 GiB, the limit is 12.0 GiB"}
    wrong = {"status": "unavailable", "reason": "wrong result: deviates from float64 by 9.7e-01"}
    rows = [
        row("native", 8, 10.0, 2.0),
        row("maxsim-cpu", 8, None, **wrong),
        row("eager_padded", 8, 2000.0, 200.0),
        row("reference", 8, 25.0, 8.0),
        row("other-package", 8, 35.0, 9.0),
        row("native", 32, 100.0, 8.0),
        row("eager_padded", 32, None, **oom),
        row("reference", 32, 250.0, 30.0),
        row("native", 128, 1600.0, 32.0),
        row("eager_padded", 128, None, **oom),
        row("reference", 128, None, **oom),
    ]
    machine = {"processor": "Some CPU", "instruction_set": "avx2", "gpu": None, "load": 0.5}
    return {"machine": machine, "versions": {"torch": "2.13.0"}, "commit": "abc", "rows": rows}


def test_ratios_are_to_the_fastest_of_our_backends(report: dict[str, Any]) -> None:
    table = benchmark_table(report)
    assert "| token_interaction | batch 8, width 768 | 10 (native) | 200.0 x | other-package 3.5 x |" in table
    assert "| token_interaction | batch 32, width 768 | 100 (native) | out of memory |  |" in table
    assert "Not timed: maxsim-cpu (wrong result: deviates from float64)." in table
    assert "Some CPU (avx2), 1 thread, float32, torch 2.13.0, load average 0.5." in table
    assert [problem.ours for problem in benchmark_problems(report)] == ["native"] * 3


def test_memory_table(report: dict[str, Any]) -> None:
    table = memory_table(report)
    assert "| operator | sizes | tokens | eager_padded | native | reference | other-package |" in table
    assert "| token_interaction | batch 8, width 768 | 1,200 | 200 | 2 | 8 | 9 |" in table
    assert "| batch 128, width 768 | 19,200 | out of memory | 32 | out of memory | - |" in table


def test_the_full_table_has_a_line_per_provider(report: dict[str, Any]) -> None:
    table = full_benchmark_table(report)
    assert sum(line.startswith("| token_interaction") for line in table.splitlines()) == len(report["rows"])
    assert "| maxsim-cpu | wrong result: deviates from float64 by 9.7e-01 |" in table
    columns = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert columns == {12}


def test_pages_name_a_report_or_its_memory(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "speed.json").write_text(json.dumps(report))
    page = "<!-- speed -->\nold\n<!-- /speed -->\n<!-- speed_memory -->\nold\n<!-- /speed_memory -->"
    rendered = render_page(page, tmp_path)
    assert "200.0 x" in rendered
    assert "| 19,200 |" in rendered
    assert "old" not in rendered


def test_render_draws_times_and_memory(
    report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "speed.json"
    file.write_text(json.dumps(report))
    main(["bench", "render", str(file), "--out", str(tmp_path / "pictures")])
    names = ["speed.md", "speed_token_interaction_time.png", "speed_token_interaction_memory.png"]
    assert capsys.readouterr().out.split() == [str(tmp_path / "pictures" / name) for name in names]
    for name in names[1:]:
        picture = (tmp_path / "pictures" / name).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 10_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("[]", "is not a report"),
        ("{", "is not a report"),
        ('{"machine": {"a": 1}, "versions": {"b": 1}, "rows": []}', "holds no measurement"),
    ],
)
def test_what_is_no_report_is_a_clear_line(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "speed.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "render", str(file), "--out", str(tmp_path)])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_mistakes_of_the_benchmark_are_the_commands_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "kernels", "--providers", "nativ"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("atomas: error: --providers: no nativ; there are ")
