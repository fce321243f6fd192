"""Density-peak clustering and the merge of clusters (csrc/cuda/clustering.cu, csrc/cuda/merging.cu)."""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, get_ctx

from atomas_kernels import checks
from atomas_kernels.cuda import library
from atomas_kernels.reference.clustering import cluster_counts

_LONGEST = 361 * 64
"""A grid is at most 65535 tiles high: those of 361 * 362 / 2 pairs of 64 tokens."""


def dpc_knn(tokens: Tensor, lengths: Tensor, *, ratio: float, k: int) -> tuple[Tensor, Tensor]:
    """See `atomas_kernels.dpc_knn`. Sequences of up to 23104 tokens; holds a float32 per pair of tokens of one."""
    counts = cluster_counts(lengths, ratio)
    assignment: Tensor = _cluster(tokens.contiguous(), lengths.contiguous(), counts, k)
    return assignment, counts


def cluster_merge(
    tokens: Tensor, weight: Tensor, assignment: Tensor, lengths: Tensor, cluster_lengths: Tensor
) -> Tensor:
    """See `atomas_kernels.cluster_merge`."""
    merged: Tensor = _merge(
        tokens.contiguous(), weight.float().contiguous(), assignment.contiguous(), lengths, cluster_lengths
    )[0]
    return merged.to(tokens.dtype)


@custom_op("atomas_kernels::cuda_dpc_knn", mutates_args=(), device_types="cuda")
def _cluster(tokens: Tensor, lengths: Tensor, counts: Tensor, k: int) -> Tensor:
    sizes = checks.segment_sizes("lengths", lengths, tokens.shape[0])
    total, width = tokens.shape
    assignment = lengths.new_empty(total)
    if total == 0:
        return assignment
    if max(sizes) > _LONGEST:
        raise ValueError(f"lengths: the native backend takes sequences of up to {_LONGEST} tokens on CUDA")
    squares = tokens.new_empty(sum(size * size for size in sizes), dtype=torch.float32)
    findings = tokens.new_empty(4 * total, dtype=torch.float32)
    ends = torch.stack((lengths, lengths.square())).cumsum(dim=1)
    metadata = (lengths, ends, counts, len(sizes), total, max(sizes), width, k)
    library.run("dpc_knn", tokens, library.dtype(tokens), tokens, *metadata, squares, findings, assignment)
    return assignment


@_cluster.register_fake
def _(tokens: Tensor, lengths: Tensor, counts: Tensor, k: int) -> Tensor:
    return lengths.new_empty(tokens.shape[0])


@custom_op("atomas_kernels::cuda_cluster_merge", mutates_args=(), device_types="cuda")
def _merge(
    tokens: Tensor, weight: Tensor, assignment: Tensor, lengths: Tensor, cluster_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Merged tokens [sum K_i, D] and the denominators [sum K_i], float32."""
    checks.segment_sizes("lengths", lengths, tokens.shape[0])
    total = int(cluster_lengths.sum())
    checks.segment_sizes("cluster_lengths", cluster_lengths, total)
    checks.index_range("assignment", assignment, cluster_lengths.repeat_interleave(lengths))
    merged, weight_sum = weight.new_empty(total, tokens.shape[1]), weight.new_empty(total)
    if merged.numel():
        layout = _layout(assignment, lengths, cluster_lengths)
        sizes = (len(lengths), tokens.shape[1], total)
        arguments = (tokens, weight, merged, weight_sum)
        library.run("cluster_merge", tokens, library.dtype(tokens), *layout, *sizes, *arguments)
    return merged, weight_sum


def _layout(assignment: Tensor, lengths: Tensor, cluster_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return lengths.cumsum(0), cluster_lengths.cumsum(0), assignment


@_merge.register_fake
def _(
    tokens: Tensor, weight: Tensor, assignment: Tensor, lengths: Tensor, cluster_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    total = get_ctx().new_dynamic_size()
    return weight.new_empty(total, tokens.shape[1]), weight.new_empty(total)


@custom_op("atomas_kernels::cuda_cluster_merge_backward", mutates_args=(), device_types="cuda")
def _merge_backward(
    grad_merged: Tensor,
    tokens: Tensor,
    weight: Tensor,
    assignment: Tensor,
    lengths: Tensor,
    cluster_lengths: Tensor,
    merged: Tensor,
    weight_sum: Tensor,
) -> tuple[Tensor, Tensor]:
    grad_tokens, grad_weight = torch.empty_like(tokens, dtype=torch.float32), torch.zeros_like(weight)
    if tokens.numel():
        layout = _layout(assignment, lengths, cluster_lengths)
        sizes = (len(lengths), tokens.shape[1], tokens.shape[0])
        arguments = (tokens, weight, merged, weight_sum, grad_merged, grad_tokens, grad_weight)
        library.run("cluster_merge_gradient", tokens, library.dtype(tokens), *layout, *sizes, *arguments)
    return grad_tokens.to(tokens.dtype), grad_weight


@_merge_backward.register_fake
def _(grad_merged: Tensor, tokens: Tensor, weight: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(tokens), torch.empty_like(weight)


def _merge_setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _merge_gradient(ctx: Any, grad_merged: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_merge_backward(grad_merged.contiguous(), *ctx.saved_tensors), None, None, None


_merge.register_autograd(_merge_gradient, setup_context=_merge_setup)
