"""Comparing two reports, and the tables and pictures of a step report, on made-up rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from atomas.benchmarks.compare import compare, different_places
from atomas.cli import main
from atomas.errors import AtomasError
from atomas.viz.step_tables import step_tables

MACHINE = {"processor": "Some CPU", "instruction_set": "avx2", "gpu": None, "cores": 2, "load": 0.5}


def row(provider: str, seconds: float | None, *, spread: float = 0.1, ranks: int = 1) -> dict[str, Any]:
    timed = seconds is not None
    quantiles = None
    if seconds is not None:
        quantiles = {
            "min": seconds * (1 - spread),
            "p20": seconds * (1 - spread),
            "p50": seconds,
            "p80": seconds * (1 + spread),
        }
    return {
        "provider": provider,
        "description": DESCRIPTIONS.get(provider),
        "batch": 8,
        "ranks": ranks,
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "status": "ok" if timed else "oom",
        "reason": None if timed else "the process ended with SIGKILL",
        "step_seconds": quantiles,
        "cpu_seconds": quantiles,
        "pairs_per_s": 8 * ranks / seconds if seconds else None,
        "tokens_per_s": 1400 / seconds if seconds else None,
        "mfu": 0.5,
        "peak_mb": 1000.0,
        "phases": {"decoder": 0.5, "backward": 1.0, "data": 0.0},
        "lengths": {"text": [880], "smiles": [560]},
    }


DESCRIPTIONS = {
    "path:losses": "losses with every mask",
    "path:packing": "nothing padded",
    "ours": "AdamW fused",
    "without:packing": "something else",
    "with:compile": "blocks compiled",
}


def report(*rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "benchmark": "step",
        "preset": "cpu-small",
        "dropout": 0.1,
        "pairs": "real pairs",
        "machine": MACHINE,
        "versions": {"torch": "2.13.0"},
        "same_loss": {"deviation": 1e-7},
        "rows": list(rows),
    }


def test_slower_and_faster_only_beyond_noise() -> None:
    before = report(row("ours", 1.0), row("published", 20.0), row("without:packing", 3.0), row("a", 1.0))
    after = report(row("ours", 1.5), row("published", 21.0), row("without:packing", 2.0), row("a", None))
    found = list(compare(before, after))
    assert [each.verdict for each in found] == ["slower", "same", "faster", "lost"]
    assert found[0].ratio == pytest.approx(1.5)
    assert [each.slower_than(20) for each in found] == [True, False, False, True]
    assert not found[0].slower_than(60)


def test_kernel_reports_are_compared_too() -> None:
    def kernels(ms: float) -> dict[str, Any]:
        times = {"p20": ms * 0.99, "p50": ms, "p80": ms * 1.01}
        shared = {"op": "attention", "mode": "full", "dtype": "float32", "threads": 1, "status": "ok"}
        return {
            "machine": MACHINE,
            "versions": {"torch": "2.13.0"},
            "rows": [{**shared, "provider": "native", "shape": {"batch": 8}, "ms": times, "peak_mb": 1.0}],
        }

    (found,) = compare(kernels(10.0), kernels(20.0))
    assert found.what == "attention, native, full, batch 8, float32, threads 1"
    assert found.verdict == "slower"
    assert found.before is not None
    assert found.before.middle == pytest.approx(0.01)


def test_reports_of_different_things_are_refused() -> None:
    with pytest.raises(AtomasError, match="no row in common"):
        list(compare(report(row("ours", 1.0)), report(row("published", 1.0))))
    other = {**report(), "machine": {**MACHINE, "processor": "Another"}}
    assert different_places(report(), other) == ["processor: Some CPU and Another"]


def test_the_command_fails_where_it_is_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, seconds in zip(files, (1.0, 1.5), strict=True):
        file.write_text(json.dumps(report(row("ours", seconds))))
    arguments = ["bench", "compare", *map(str, files)]
    main(arguments)
    assert "slower" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--fail-slower", "10"])
    assert stop.value.code == 1
    main([*arguments, "--fail-slower", "80"])


def test_tables_hold_the_numbers() -> None:
    table = step_tables(
        report(
            row("published", 20.0),
            row("path:losses", 10.0),
            row("path:packing", None),
            row("ours", 1.0),
            row("without:packing", 3.0),
            row("with:compile", 0.5),
        )
    )
    assert "| ours | 1 | 1 | 8 | 1,400 | 50.0 % | 1,000 | 20.0 x |" in table
    assert "| losses with every mask | 10 | 10 | 2.00 x | 1,000 |" in table
    assert "| + nothing padded | out of memory | | | |" in table
    assert "| + AdamW fused: ours | 1 | 1 | 10.00 x | 1,000 |" in table
    assert "| without packing: something else | 3 | 3.00 x | 1,000 | +0 |" in table
    assert "| with compile: blocks compiled | 0.5 | 0.50 x | 1,000 | +0 |" in table
    assert "| backward | 1 | 67 % |" in table
    assert "110 text and 70 SMILES tokens" in table


def test_scaling_table() -> None:
    table = step_tables(report(row("ours", 1.0), row("ours", 2.0, ranks=2)))
    assert "| 2 | 16 | 2 | 8 | 50 % | 2 | 1,000 |" in table


def test_pictures(tmp_path: Path) -> None:
    file = tmp_path / "cpu-small.json"
    rows = [row("published", 20.0), row("path:losses", 10.0), row("ours", 1.0), row("without:packing", 3.0)]
    file.write_text(json.dumps(report(*rows)))
    main(["bench", "render", str(file), "--out", str(tmp_path / "out")])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"cpu-small.md", "cpu-small_waterfall.png", "cpu-small_variants.png"}
