"""The heads' layers against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from transformers.models.t5.modeling_t5 import T5LayerNorm

from atomas.model.layers import Dropout, LayerNorm, Linear, RMSNorm, SequenceConvolution
from atomas.model.ragged import positions


@pytest.mark.parametrize("lengths", [[5, 1, 3], [1], [2, 2], [1, 1]])
def test_convolution_sees_zeros_beyond_each_sequence(lengths: list[int]) -> None:
    layer = SequenceConvolution(6).double()
    x = torch.randn(sum(lengths), 6, dtype=torch.float64)
    parts = [F.conv1d(part.T[None], layer.weight, padding=1)[0].T for part in x.split(lengths)]
    assert_close(layer(x, positions(torch.tensor(lengths))), torch.cat(parts))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16])
def test_layers_return_float32(weights: torch.dtype, inputs: torch.dtype) -> None:
    x = torch.randn(4, 8, dtype=inputs)
    for ours, theirs in ((Linear(8, 3), nn.Linear(8, 3)), (LayerNorm(8), nn.LayerNorm(8))):
        theirs.load_state_dict(ours.state_dict())
        out = ours.to(weights)(x)
        assert out.dtype == torch.float32
        assert_close(out, theirs(x.float()), rtol=2e-2, atol=2e-2)


def test_norm_of_bf16_weights_does_not_round_its_input() -> None:
    x = torch.randn(4, 8) + 100  # the spread would be lost in bf16
    assert_close(LayerNorm(8).to(torch.bfloat16)(x), F.layer_norm(x, (8,)))


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight.double()


def test_rms_norm_is_that_of_t5() -> None:
    weight = nn.Parameter(torch.rand(64))
    theirs = T5LayerNorm(64, eps=1e-6)
    theirs.load_state_dict({"weight": weight})
    x = torch.randn(50, 64)
    assert_close(RMSNorm(weight, 1e-6)(x), theirs(x), rtol=1e-6, atol=1e-6)


def test_rms_norm_of_float64_reduces_in_float64() -> None:
    weight = nn.Parameter(torch.rand(64, dtype=torch.float64))
    x = torch.randn(50, 64, dtype=torch.float64, requires_grad=True)
    assert_close(RMSNorm(weight, 1e-6)(x), _rms_norm(x, weight, 1e-6), rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(RMSNorm(weight, 1e-6), x)


@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16])
def test_rms_norm_in_bf16_rounds_once(inputs: torch.dtype) -> None:
    weight = nn.Parameter(torch.rand(512).bfloat16())
    x = (torch.randn(50, 512) * torch.logspace(-2, 2, 50)[:, None]).to(inputs)
    out = RMSNorm(weight, 1e-6)(x)
    assert out.dtype == torch.bfloat16
    exact = _rms_norm(x, weight, 1e-6)
    # Half a unit in the last of the 8 bits that bf16 keeps, and what float32 leaves open at a tie. T5 rounds twice.
    assert ((out.double() - exact).abs() <= exact.abs() * (2**-8 * 1.001)).all()
    theirs = T5LayerNorm(512, eps=1e-6).to(torch.bfloat16)
    theirs.load_state_dict({"weight": weight})
    assert not ((theirs(x).double() - exact).abs() <= exact.abs() * (2**-8 * 1.001)).all()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_drops_at_its_rate(rate: float) -> None:
    torch.manual_seed(0)
    x = torch.full((999, 1001), 3.0, requires_grad=True)
    out = Dropout(rate)(x)
    kept = out != 0
    share = kept.double().mean().item()
    deviation = (rate * (1 - rate) / x.numel()) ** 0.5
    assert abs(share - (1 - rate)) < 5 * deviation
    # Neighbours are decided by one random number: they must not be decided alike.
    both = (kept[:, 1:] & kept[:, :-1]).double().mean().item()
    assert abs(both - (1 - rate) ** 2) < 10 * deviation
    assert_close(out[kept], torch.full_like(out[kept], 3 / (1 - rate)), rtol=2**-12, atol=0)
    out.sum().backward()
    assert_close(x.grad, out.detach() / 3)


def test_dropout_is_off_in_evaluation_and_at_rate_zero() -> None:
    x = torch.randn(5, 3)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert not Dropout(1.0)(x).any()
