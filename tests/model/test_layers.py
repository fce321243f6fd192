"""The heads' layers against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from atomas.model.layers import LayerNorm, Linear, SequenceConvolution
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
