"""What the driver reports, and whether a kernel that computes something else is noticed."""

import pytest
import torch

import atomas_kernels
from atomas.diagnosis import devices

HEALTHY = "0, 0, Not Active, 41, 4, 81559\n1, [N/A], Not Active, 43, 4, 81559\n"


def test_healthy_gpus() -> None:
    result = devices.gpu_health(HEALTHY)
    assert (result.status, result.message) == ("ok", "no uncorrected memory errors; hottest 43 C")


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ("2, 3, Not Active, 40, 4, 81559", "error", "GPU 2 has 3 uncorrected memory errors"),
        ("2, 0, Active, 91, 4, 81559", "warning", "GPU 2 is slowed down by its hardware at 91 C"),
        ("2, 0, Not Active, 40, 40000, 81559", "warning", "GPU 2 has 40000 of 81559 MiB taken"),
    ],
)
def test_unhealthy_gpus(line: str, status: str, message: str) -> None:
    result = devices.gpu_health(HEALTHY + line)
    assert (result.status, result.message) == (status, message)


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
