"""What the driver reports, and whether a kernel that computes something else is noticed."""

from pathlib import Path

import pytest
import torch

import atomas_kernels
from atomas.diagnosis import devices

HEALTHY = (
    "0, 0, No, Not Active, Not Active, 41, 4, 81559\n1, 0, [N/A], Not Active, Not Active, 43, 4, 81559\n"
)


def test_healthy_gpus() -> None:
    result = devices.gpu_health(HEALTHY)
    assert (result.status, result.message) == ("ok", "no uncorrected memory errors; hottest 43 C")


def test_a_gpu_that_does_not_count_errors_is_named() -> None:
    consumer = "2, [N/A], [N/A], Not Active, [Not Supported], 43, 4, 24564\n"
    assert "where they are counted (not on GPU 2)" in devices.gpu_health(HEALTHY + consumer).message


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ("3, No, Not Active, Not Active, 40, 4", "error", "GPU 2 has 3 uncorrected memory errors"),
        ("0, Yes, Not Active, Not Active, 40, 4", "error", "GPU 2 waits for a reset that retires bad memory"),
        ("0, No, Active, Not Active, 91, 4", "warning", "GPU 2 is slowed down by its hardware at 91 C"),
        (
            "0, No, Not Active, Active, 89, 4",
            "warning",
            "GPU 2 is slowed down by its driver, which finds it too hot",
        ),
        ("0, No, Not Active, Not Active, 40, 40000", "warning", "GPU 2 has 40000 of 81559 MiB taken"),
    ],
)
def test_unhealthy_gpus(line: str, status: str, message: str) -> None:
    result = devices.gpu_health(f"{HEALTHY}2, {line}, 81559\n")
    assert result.status == status
    assert result.message.startswith(message)


@pytest.mark.parametrize(
    ("script", "status", "message"),
    [
        (f"echo '{HEALTHY.splitlines()[0]}'", "ok", "no uncorrected memory errors"),
        (
            "echo 'Unable to determine the device handle for GPU: GPU is lost'; exit 15",
            "error",
            "is lost",
        ),
        ("exit 9", "error", "nvidia-smi failed: exit code 9"),
    ],
)
def test_the_program_is_asked(
    script: str, status: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    result = devices.check_gpu_health()
    assert result.status == status
    assert message in result.message


def test_kernels_on_this_host() -> None:
    before = atomas_kernels.registry._chosen
    results = {result.name: result for result in devices.check_kernels()}
    assert results["native kernels, CPU"].status in ("ok", "warning")
    if not torch.cuda.is_available():
        assert results["Triton kernels"].status == "skipped"
    assert atomas_kernels.registry._chosen == before


def test_a_wrong_kernel_forbids_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    if devices.check_kernels()[0].status != "ok":
        pytest.skip("needs the native kernels")
    native = atomas_kernels.registry.implementation
    atomas_kernels.set_backend("native")
    try:
        right = native("token_interaction", torch.zeros(1, 1))
    finally:
        atomas_kernels.set_backend("auto")
    target = "atomas_kernels.native:token_interaction"
    monkeypatch.setitem(atomas_kernels.registry._loaded, target, lambda *given: right(*given) * 1.001)
    result = devices.check_kernels()[0]
    assert result.status == "error"
    assert "token_interaction deviates from the reference by 1.0e-03" in result.message
