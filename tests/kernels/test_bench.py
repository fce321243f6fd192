"""The benchmark command on a tiny problem."""

import json
from pathlib import Path

import pytest

from atomas_kernels.bench import clustering, interaction
from atomas_kernels.bench.__main__ import main


@pytest.mark.parametrize(("op", "module"), [("token_interaction", interaction), ("clustering", clustering)])
def test_every_provider_is_a_row_and_agrees_with_float64(op: str, module: object, tmp_path: Path) -> None:
    providers = [name for name in module.PROVIDERS if name != "compile_masked"]  # type: ignore[attr-defined]
    path = tmp_path / "deep" / "result.json"
    arguments = ["--op", op, "--batch", "2", "--width", "16", "--repeats", "2"]
    assert main([*arguments, "--json", str(path), "--providers", *providers]) == 0
    report = json.loads(path.read_text())
    assert {"machine", "versions", "commit", "dirty"} <= report.keys()
    assert [row["provider"] for row in report["rows"]] == providers
    for row in report["rows"]:
        if row["status"] == "unavailable":
            assert row["provider"] == "native"
            assert row["reason"]
        else:
            assert row["ms"]["full"]["p50"] > 0
            assert row["error"] < 1e-4


def test_a_wrong_result_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = interaction.PROVIDERS["reference"]

    def build(case: object) -> object:
        forward, leaves = right.build(case)  # type: ignore[arg-type]
        return (lambda: forward() * 1.01), leaves

    wrong = type(right)(build=build)  # type: ignore[arg-type]
    monkeypatch.setitem(interaction.PROVIDERS, "native", wrong)
    with pytest.raises(AssertionError, match="deviate from float64"):
        main(["--op", "token_interaction", "--batch", "2", "--width", "16", "--providers", "native"])
