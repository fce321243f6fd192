"""Padding and back."""

import torch
from torch.testing import assert_close

from atomas.data.batching import length_buckets
from atomas.model.ragged import PaddedRows, flatten, positions, segment_sum

LENGTHS = torch.tensor([3, 7, 1, 7, 2])


def test_flatten_undoes_pad_whatever_the_groups() -> None:
    flat = torch.randn(int(LENGTHS.sum()), 4)
    for budget in (1, 8, 14, 1000):
        blocks = [PaddedRows.of(LENGTHS, rows) for rows in length_buckets(LENGTHS, budget)]
        assert_close(flatten(blocks, [block.pad(flat) for block in blocks]), flat, rtol=0, atol=0)


def test_pad_puts_every_sequence_into_its_row() -> None:
    flat = torch.arange(20)
    block = PaddedRows.of(LENGTHS, torch.tensor([4, 0]))
    padded = block.pad(flat)
    assert block.mask.tolist() == [[True, True, False], [True, True, True]]
    assert padded[block.mask].tolist() == [18, 19, 0, 1, 2]


def test_segment_sum_and_its_gradient() -> None:
    values = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([part.sum(0) for part in values.split(LENGTHS.tolist())])
    assert_close(segment_sum(values, LENGTHS), expected)
    assert torch.autograd.gradcheck(lambda x: segment_sum(x, LENGTHS), values)


def test_positions_count_from_zero_in_every_sequence() -> None:
    assert positions(LENGTHS).tolist() == [i for n in LENGTHS.tolist() for i in range(n)]
