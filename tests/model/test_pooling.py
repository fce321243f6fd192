"""Sequence to vector."""

import pytest
import torch
from torch.testing import assert_close

from atomas.errors import AtomasError
from atomas.model.pooling import AttentionPooling, MeanPooling, PositionLinear, build_pooler

LENGTHS = torch.tensor([4, 1, 6])


def test_mean() -> None:
    states = torch.randn(11, 5)
    expected = torch.stack([part.mean(0) for part in states.split(LENGTHS.tolist())])
    assert_close(MeanPooling()(states, LENGTHS), expected)


def test_position_linear_is_a_linear_layer_over_positions() -> None:
    pooler = PositionLinear(6)
    states = torch.randn(11, 5)
    padded = torch.stack(
        [torch.cat([part, torch.zeros(6 - len(part), 5)]) for part in states.split(LENGTHS.tolist())]
    )
    expected = torch.nn.functional.linear(padded.transpose(1, 2), pooler.weight, pooler.bias).squeeze(2)
    assert_close(pooler(states, LENGTHS), expected)


def test_position_linear_refuses_more_tokens_than_positions() -> None:
    with pytest.raises(AtomasError, match=r"6 tokens.* 5 .*max_text_tokens"):
        PositionLinear(5)(torch.randn(11, 5), LENGTHS)


def test_attention_pooling_is_a_convex_combination() -> None:
    pooler = AttentionPooling(5)
    ones = torch.ones(11, 5)
    assert_close(pooler(ones, LENGTHS), torch.ones(3, 5))
    pooler.score.weight.data.fill_(100.0)
    states = torch.randn(11, 5)
    picked = torch.stack([part[part.sum(1).argmax()] for part in states.split(LENGTHS.tolist())])
    assert_close(pooler(states, LENGTHS), picked)


@pytest.mark.parametrize("name", ["position_linear", "mean", "attention"])
def test_names(name: str) -> None:
    pooler = build_pooler(name, width=5, max_length=6)  # type: ignore[arg-type]
    assert pooler(torch.randn(11, 5), LENGTHS).shape == (3, 5)
