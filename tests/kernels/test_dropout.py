"""Dropout: rate, independence, mean, gradient, and that torch's generator decides."""

import pytest
import torch

import atomas_kernels as ak

BACKENDS = ["reference", "native"]


@pytest.fixture(params=BACKENDS, autouse=True)
def _backend(request: pytest.FixtureRequest) -> object:
    if request.param == "native":
        pytest.importorskip("atomas_kernels._native", reason="the compiled module was not built")
    ak.set_backend(request.param)
    yield
    ak.set_backend("auto")


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_rate_scale_and_independence(rate: float) -> None:
    torch.manual_seed(0)
    kept = ak.dropout(torch.ones(300, 1001), rate)
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)], rel=1e-4)
    mask = (kept == 0).double() - rate
    spread = rate * (1 - rate)
    assert abs(float(mask.mean())) < 5 * (spread / mask.numel()) ** 0.5
    for shifted in (1, 16, 1001, 1 << 16):
        product = mask.flatten()[shifted:] * mask.flatten()[:-shifted]
        assert abs(float(product.mean())) < 5 * spread / product.numel() ** 0.5


@pytest.mark.parametrize("count", [0, 1, 17, 70_001])
def test_the_gradient_has_the_same_mask(count: int) -> None:
    torch.manual_seed(count)
    values = torch.randn(count).requires_grad_()
    dropped = ak.dropout(values, 0.3)
    upstream = torch.randn(count)
    (gradient,) = torch.autograd.grad(dropped, values, upstream)
    scale = 1 / (1 - 0.3) * (dropped != 0)
    torch.testing.assert_close(dropped, values * scale, rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient, upstream * scale, rtol=1e-4, atol=0)


def test_the_generator_decides() -> None:
    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return ak.dropout(torch.ones(1000), 0.5)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_none_and_all(rate: float) -> None:
    values = torch.randn(5, 7)
    assert torch.equal(ak.dropout(values, rate), values * (1 - rate))


def test_half_precision_keeps_its_dtype() -> None:
    assert ak.dropout(torch.ones(9, dtype=torch.bfloat16), 0.5).dtype == torch.bfloat16


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"^values: "):
        ak.dropout(torch.ones(3, dtype=torch.int64), 0.5)
    with pytest.raises(ValueError, match=r"^rate: "):
        ak.dropout(torch.ones(3), 1.5)
