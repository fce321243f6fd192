"""What the Triton compiler makes of the kernels, for GPUs that are not here: no spill, tensor cores where they belong.

Every run compiles the first variant of each kernel for sm_80 and sm_90; all variants, for sm_100 too, are compiled by
`python -m atomas_kernels.aot`, whose figures the repository holds, and by the slow test.
"""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("triton")

from atomas_kernels import aot
from atomas_kernels.triton.variants import ARCHITECTURES

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

RESOURCES = Path(__file__).parents[2] / "docs" / "results" / "kernel_resources.json"


def _violations(work: list[tuple[str, int]]) -> list[str]:
    return [v for row in aot.measure_all(work, os.cpu_count() or 1) for v in aot.violations(row)]


def test_the_main_variant_of_every_kernel_compiles_well() -> None:
    work = [(name, architecture) for architecture in (80, 90) for name in aot.main_variants(architecture)]
    assert len({name.partition("_")[0] for name, _ in work}) > 1
    assert _violations(work) == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_variant_compiles_well(architecture: int) -> None:
    assert _violations([(name, architecture) for name in aot.variants(architecture)]) == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_recorded_figures_are_of_these_variants_and_hold_no_violation(architecture: int) -> None:
    recorded = {}
    for row in json.loads(RESOURCES.read_text())["rows"]:
        if row["architecture"] == f"sm_{architecture}":
            recorded[row["kernel"]] = row
            assert aot.violations(row) == []
    current = {name: aot.describe(name, architecture) for name in aot.variants(architecture)}
    stale = {name for name, what in current.items() if not what.items() <= recorded.get(name, {}).items()}
    outdated = stale | (recorded.keys() - current.keys())
    assert not outdated, "run python -m atomas_kernels.aot --check --json docs/results/kernel_resources.json"


GOOD = {
    "kernel": "x",
    "architecture": "sm_90",
    "registers": 255,
    "stack_bytes": 0,
    "shared_bytes": 227 * 1024,
    "spill_instructions": 0,
    "tensor_core_instructions": 0,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"registers": 256}, "registers"),
        ({"stack_bytes": 8}, "spills"),
        ({"spill_instructions": 1}, "spills"),
        ({"architecture": "sm_80"}, "shared memory"),
        ({"kernel": "a product"}, "no tensor core"),
        ({"error": "PTXASError"}, "does not compile"),
    ],
)
def test_each_violation_is_named(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, object], said: str
) -> None:
    class Product:
        tensor_cores = True

    monkeypatch.setattr(aot, "variants", lambda architecture: {"a product": Product})
    assert aot.violations(GOOD) == []
    (violation,) = aot.violations(GOOD | change)
    assert said in violation
    assert f"{(GOOD | change)['kernel']} on sm_" in violation


def test_a_variant_that_does_not_compile_is_a_row(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(variant: object, architecture: int) -> None:
        print("ten thousand lines of PTX")
        raise RuntimeError("Insufficient registers")

    monkeypatch.setattr(aot, "_compile", fail)
    name = aot.main_variants(90)[0]
    row = aot.measure(name, 90)
    assert "Insufficient registers" in row["error"]
    assert len(aot.violations(row)) == 1
    assert capfd.readouterr().out == ""
