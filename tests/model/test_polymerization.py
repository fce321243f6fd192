"""One level step against the method written out sequence by sequence."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from atomas.model.polymerization import Polymerization
from atomas_kernels import dpc_knn


def _step_of_one_sequence(layer: Any, tokens: Tensor, heads: int) -> Tensor:
    """Method section 3.1 on [N, D]."""
    convolved = F.conv1d(tokens.T[None], layer.convolution.weight, padding=1)[0].T
    x = F.layer_norm(tokens + convolved, tokens.shape[1:], layer.norm.weight, layer.norm.bias)
    score = F.linear(x, layer.score.weight, layer.score.bias)[:, 0]
    weight = score.exp()
    assignment, counts = dpc_knn(x, torch.tensor([len(x)]), ratio=layer.ratio, k=layer.neighbours)
    merged = torch.stack(
        [
            (weight * mine) @ x / (weight[mine].sum() + 1e-6)
            for mine in (assignment == c for c in range(int(counts)))
        ]
    )
    attention = layer.attention
    q = attention.query(attention.norm(merged)).unflatten(1, (heads, -1))
    k, v = attention.key_value(attention.norm(x)).unflatten(1, (2, heads, -1)).unbind(1)
    logits = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[2]) + score
    return merged + attention.output(torch.einsum("hij,jhd->ihd", logits.softmax(-1), v).flatten(1))


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_step_is_the_method_on_each_sequence_alone(ratio: float) -> None:
    torch.manual_seed(0)
    layer = Polymerization(16, ratio=ratio, neighbours=3, heads=4).double()
    lengths = [9, 1, 4, 13, 2]
    tokens = torch.randn(sum(lengths), 16, dtype=torch.float64)
    result = layer(tokens, torch.tensor(lengths))

    expected = [_step_of_one_sequence(layer, part, 4) for part in tokens.split(lengths)]
    assert result.lengths.tolist() == [math.ceil(ratio * n) for n in lengths]
    assert_close(result.tokens, torch.cat(expected))
    assert len(result.assignment) == len(tokens)


def test_gradients() -> None:
    torch.manual_seed(0)
    layer = Polymerization(8, ratio=0.5, neighbours=2, heads=2).double()
    tokens = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x, torch.tensor([5, 2])).tokens, tokens)
    layer(tokens, torch.tensor([5, 2])).tokens.square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
