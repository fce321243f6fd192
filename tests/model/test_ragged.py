"""Sums and places of ragged values."""

import torch
from torch.testing import assert_close

from atomas.model.ragged import positions, segment_sum

LENGTHS = torch.tensor([3, 7, 1, 7, 2])


def test_segment_sum_and_its_gradient() -> None:
    values = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([part.sum(0) for part in values.split(LENGTHS.tolist())])
    assert_close(segment_sum(values, LENGTHS), expected)
    assert torch.autograd.gradcheck(lambda x: segment_sum(x, LENGTHS), values)


def test_positions_count_from_zero_in_every_sequence() -> None:
    assert positions(LENGTHS).tolist() == [i for n in LENGTHS.tolist() for i in range(n)]
