"""What reduces in float32 although its inputs are bf16, against float64; a reduction in bf16 is seen to fail."""

import torch
import torch.nn.functional as F
from torch import Tensor

from atomas_kernels import lm_cross_entropy, packed_attention

HALF_UNIT = 2**-8
"""Largest relative error of one rounding to the 8 bits of bf16."""


def test_the_softmax_of_attention_reduces_in_float32() -> None:
    torch.manual_seed(0)
    keys, lengths = 600, torch.tensor([600])
    query, key = (torch.randn(keys, 2, 16).bfloat16() for _ in range(2))
    value = torch.rand(keys, 2, 16).bfloat16()  # positive: nothing cancels, so that an error is relative
    out = packed_attention(query, key, value, lengths, lengths, distance_bias=None, causal=False, dropout=0.0)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q.transpose(0, 1) @ k.permute(1, 2, 0)).softmax(dim=-1) @ v.transpose(0, 1)).transpose(0, 1)

    exact = attend(query.double(), key.double(), value.double())

    def worst(result: Tensor) -> float:
        return float(((result.double() - exact).abs() / exact).max())

    assert out.dtype == torch.bfloat16
    assert (
        worst(out) < 2 * HALF_UNIT
    )  # flash attention rounds the weights before their product with the values
    assert worst(attend(query, key, value)) > 8 * HALF_UNIT


def test_the_language_model_loss_reduces_in_float32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 32).bfloat16(), torch.randn(5000, 32).bfloat16()
    labels = torch.randint(5000, (50,))
    logits = hidden @ weight.T  # products of the run's precision; what follows is not
    exact = F.cross_entropy(logits.double(), labels)
    assert abs(lm_cross_entropy(hidden, weight, labels).double() - exact) < 1e-5 * exact
    assert abs(F.cross_entropy(logits, labels).double() - exact) > 1e-5 * exact
