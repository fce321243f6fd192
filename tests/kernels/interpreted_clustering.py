"""Triton kernels in the interpreter, on CPU tensors; run by test_triton.py in a process with TRITON_INTERPRET=1.

Only float32 and float16: the interpreter's arithmetic on bfloat16 is wrong.
"""

import os

import pytest
import torch

from atomas_kernels.reference import clustering as reference
from atomas_kernels.triton import clustering

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


@pytest.mark.parametrize("sizes", [[1], [2, 0, 3], [15, 16, 17], [31, 33], [64, 65], [127, 128, 5], [129, 4]])
@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_dpc_knn(sizes: list[int], ratio: float) -> None:
    tokens = torch.randn(sum(sizes), 40, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor(sizes)
    got, expected = (op(tokens, lengths, ratio=ratio, k=3) for op in (clustering.dpc_knn, reference.dpc_knn))
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("k", [1, 3, 50])
def test_dpc_knn_with_exact_ties(k: int) -> None:
    tokens = torch.randint(-1, 2, (60, 6), generator=torch.Generator().manual_seed(k)).half()
    lengths = torch.tensor([40, 20])
    got, expected = (op(tokens, lengths, ratio=0.5, k=k) for op in (clustering.dpc_knn, reference.dpc_knn))
    assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_dpc_knn_with_a_non_finite_token(poison: float) -> None:
    tokens = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    tokens[14, 2] = poison
    lengths = torch.tensor([12, 18])
    got, expected = (op(tokens, lengths, ratio=0.25, k=3) for op in (clustering.dpc_knn, reference.dpc_knn))
    assert torch.equal(got[0], expected[0])
