"""Cluster merge in the interpreter, on CPU tensors; run by test_triton_merge.py with TRITON_INTERPRET=1.

Only float32 and float16: the interpreter's arithmetic on bfloat16 is wrong.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from atomas_kernels.reference import clustering as reference
from atomas_kernels.triton import merge

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


def _problem(sizes: list[int], width: int, ratio: float = 0.25) -> tuple[list[Tensor], list[Tensor]]:
    """Tokens and weight; random assignment, lengths and cluster lengths."""
    generator = torch.Generator().manual_seed(sum(sizes))
    lengths = torch.tensor(sizes, dtype=torch.int64)
    counts = reference.cluster_counts(lengths, ratio)
    tokens = torch.randn(sum(sizes), width, generator=generator)
    weight = torch.rand(sum(sizes), generator=generator)
    draws = torch.rand(sum(sizes), generator=generator, dtype=torch.float64)
    assignment = (draws * counts.repeat_interleave(lengths)).long()
    return [tokens, weight], [assignment, lengths, counts]


def _with_gradients(
    operator: Callable[..., Tensor], leaves: list[Tensor], rest: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    merged = operator(*leaves, *rest)
    upstream = torch.linspace(-1, 1, merged.numel()).view_as(merged).to(merged.dtype)
    return [merged, *torch.autograd.grad((merged * upstream).sum(), leaves)]


def _assert_near(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(got, expected, strict=True):
        scale = max(b.abs().max().item(), 1e-3) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b.double(), atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize(
    ("sizes", "width"),
    [([9, 0, 1, 30], 33), ([2, 127, 128, 129], 16), ([300, 5], 130), ([], 8), ([0, 0], 8), ([4], 1)],
)
def test_cluster_merge_is_the_reference(sizes: list[int], width: int) -> None:
    leaves, rest = _problem(sizes, width)
    got = _with_gradients(merge.cluster_merge, leaves, rest, torch.float32)
    _assert_near(got, _with_gradients(reference.cluster_merge, leaves, rest, torch.float64), 1e-5)


def test_half_precision_is_computed_in_single() -> None:
    leaves, rest = _problem([40, 7], 24)
    leaves = [x.half() for x in leaves]
    got = _with_gradients(merge.cluster_merge, leaves, rest, torch.float16)
    assert all(x.dtype == torch.float16 for x in got)
    _assert_near(got, _with_gradients(reference.cluster_merge, leaves, rest, torch.float64), 1e-3)


def test_clusters_of_one_token_have_hardly_a_weight_gradient() -> None:
    leaves, rest = _problem([12], 16, ratio=1.0)
    rest[0] = torch.arange(12)
    leaves = [leaves[0].half(), leaves[1] + 0.5]
    merged = merge.cluster_merge(*(x.requires_grad_() for x in leaves), *rest)
    (grad_weight,) = torch.autograd.grad(merged.float().sum(), leaves[1])
    assert grad_weight.abs().max() < 1e-4


def test_empty_clusters_are_zero_and_zero_weights_harmless() -> None:
    leaves, rest = _problem([20, 6], 16)
    rest[0].zero_()
    leaves[1][20:] = 0
    got = _with_gradients(merge.cluster_merge, leaves, rest, torch.float32)
    assert not got[0][1:5].any()
    assert not got[0][5:].any()
    _assert_near(got, _with_gradients(reference.cluster_merge, leaves, rest, torch.float64), 1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_non_finite_token_stays_in_its_cluster(poison: float) -> None:
    leaves, rest = _problem([20, 30], 16)
    leaves[0][7, 3] = poison
    merged = merge.cluster_merge(*leaves, *rest)
    torch.testing.assert_close(merged, reference.cluster_merge(*leaves, *rest), equal_nan=True)
    assert (~merged.isfinite()).sum() == 1


def test_a_sequence_does_not_depend_on_the_batch_around_it() -> None:
    leaves, rest = _problem([33, 7, 50], 24)
    merged = merge.cluster_merge(*leaves, *rest)
    assert torch.equal(merged, merge.cluster_merge(*leaves, *rest))
    alone = merge.cluster_merge(
        leaves[0][33:40], leaves[1][33:40], rest[0][33:40], rest[1][1:2], rest[2][1:2]
    )
    assert torch.equal(alone, merged[rest[2][0] : rest[2][:2].sum()])


def test_bad_input_is_named() -> None:
    leaves, (assignment, lengths, counts) = _problem([6, 3], 4)
    with pytest.raises(ValueError, match=r"^lengths: "):
        merge.cluster_merge(*leaves, assignment, lengths + 1, counts)
    with pytest.raises(ValueError, match=r"^lengths: negative"):
        merge.cluster_merge(*leaves, assignment, torch.tensor([10, -1]), counts)
    with pytest.raises(ValueError, match=r"^cluster_lengths: negative"):
        merge.cluster_merge(*leaves, assignment, lengths, torch.tensor([3, -1]))
    for wrong in (-1, 2):
        assignment[3] = wrong
        with pytest.raises(ValueError, match=r"^assignment: "):
            merge.cluster_merge(*leaves, assignment, lengths, counts)


def test_the_operator_is_well_formed_for_torch() -> None:
    leaves, rest = _problem([5, 0, 6], 8)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (*(x.requires_grad_() for x in leaves), *rest)
    torch.library.opcheck(merge._merge, arguments, test_utils=utilities)


@pytest.mark.parametrize("number", range(4))
def test_golden_clusters(golden: Path, number: int) -> None:
    prefix = f"case{number}."
    case = load_file(golden / "clustering.safetensors")
    tokens, score, labels, expected = (
        case[prefix + name] for name in ("tokens", "score", "assignment", "merged")
    )
    batch, n, width = tokens.shape
    lengths, counts = torch.full((batch,), n), torch.full((batch,), expected.shape[1])
    merged = merge.cluster_merge(
        tokens.reshape(-1, width), score.exp().flatten(), labels.flatten(), lengths, counts
    )
    torch.testing.assert_close(merged.view_as(expected), expected, atol=1e-6, rtol=1e-5)
