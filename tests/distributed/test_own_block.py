"""The loss of an own block against the operator that sees all scores, and against the formula."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from atomas.distributed.own_block import OwnBlock, own_block_info_nce
from atomas.distributed.partition import Partition
from atomas_kernels import info_nce

PAIRS = 7
RELATED = torch.eye(PAIRS, dtype=torch.bool)
RELATED[[0, 3, 3, 5], [3, 0, 5, 3]] = True


def _relation(rows: Tensor, columns: Tensor) -> Tensor:
    return RELATED[rows][:, columns]


def _problem() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    scores = torch.randn(PAIRS, PAIRS, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    return scores, scale


def _loss(scores: Tensor, scale: Tensor, mode: Any) -> tuple[Tensor, Tensor]:
    return own_block_info_nce(scores, scale, OwnBlock(scale, Partition((PAIRS,)), _relation, mode))


@pytest.mark.parametrize("mode", ["keep", "mask"])
def test_it_is_info_nce(mode: str) -> None:
    scores, scale = _problem()
    loss, _ = _loss(scores, scale, mode)
    found = torch.autograd.grad(loss, [scores, scale])
    expected = info_nce(scores, scale, negative_mask=RELATED if mode == "mask" else None)
    assert_close(loss, expected)
    assert_close(found, torch.autograd.grad(expected, [scores, scale]))


def test_a_small_loss_of_large_logits_keeps_its_digits() -> None:
    torch.manual_seed(0)
    scores = 0.4 * (torch.eye(512) + torch.rand(512, 512))

    def loss(dtype: torch.dtype) -> Tensor:
        scale = torch.tensor([100.0], dtype=dtype)
        block = OwnBlock(scale, Partition((512,)), lambda rows, columns: rows[:, None] == columns, "keep")
        return own_block_info_nce(scores.to(dtype), scale, block)[0]

    assert_close(loss(torch.float32).double(), loss(torch.float64), rtol=1e-5, atol=0)


def test_several_positives_share_the_target() -> None:
    scores, scale = _problem()
    loss, _ = _loss(scores, scale, "multi_positive")
    found = torch.autograd.grad(loss, [scores, scale])
    targets = RELATED / RELATED.sum(1, keepdim=True)
    logits = scores * scale
    rows = -(targets * logits.log_softmax(1)).sum(1).mean()
    columns = -(targets * logits.T.log_softmax(1)).sum(1).mean()
    expected = (rows + columns) / 2
    assert_close(loss, expected)
    assert_close(found, torch.autograd.grad(expected, [scores, scale]))


def test_gradients_are_those_of_finite_differences() -> None:
    scores, scale = _problem()
    for mode in ("keep", "mask", "multi_positive"):
        assert torch.autograd.gradcheck(lambda *x, mode=mode: _loss(*x, mode)[0], (scores, scale))


def test_recall_counts_rows_and_columns_and_loses_ties() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0], [3.0, 2.0, 2.0], [0.0, 0.0, 5.0]])
    partition = Partition((3,))
    scale = torch.ones(1)

    def unrelated(rows: Tensor, columns: Tensor) -> Tensor:
        return rows[:, None] == columns

    _, recall = own_block_info_nce(scores, scale, OwnBlock(scale, partition, unrelated, "keep"))
    assert_close(recall, torch.tensor((2 / 3 + 2 / 3) / 2))  # row 1 and column 0 are lost
    _, recall = own_block_info_nce(torch.ones(3, 3), scale, OwnBlock(scale, partition, unrelated, "keep"))
    assert recall == 0

    def first_two(rows: Tensor, columns: Tensor) -> Tensor:
        return (rows[:, None] < 2) & (columns < 2)

    _, recall = own_block_info_nce(scores, scale, OwnBlock(scale, partition, first_two, "mask"))
    assert_close(recall, torch.tensor((2 / 3 + 1) / 2))  # row 1 still ties with column 2


@pytest.mark.parametrize("mode", ["keep", "mask", "multi_positive"])
def test_tiles_are_the_whole(mode: Any) -> None:
    scores, scale = _problem()
    partition = Partition((PAIRS,))
    expected, expected_recall = _loss(scores, scale, mode)
    whole = torch.autograd.grad(expected, [scores, scale])
    numbers = torch.arange(PAIRS).split([3, 1, 3])
    block = OwnBlock(scale, partition, _relation, mode)
    for columns in numbers:
        for rows in reversed(numbers):
            block.observe(scores.detach()[rows][:, columns], rows, columns)
    loss, recall = block.close()
    assert_close((loss, recall), (expected.detach(), expected_recall))
    of_scale = torch.zeros_like(scale)
    for rows in numbers:
        for columns in numbers:
            of_tile, share = block.gradient(scores.detach()[rows][:, columns], rows, columns)
            assert_close(of_tile, whole[0][rows][:, columns])
            of_scale += share
    assert_close(of_scale, whole[1])
