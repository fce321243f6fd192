"""Density-peak clustering and the merge of clusters (csrc/cpu/clustering.cpp)."""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, get_ctx

from atomas_kernels import _native, checks
from atomas_kernels.native import machine
from atomas_kernels.reference.clustering import cluster_counts


def dpc_knn(tokens: Tensor, lengths: Tensor, *, ratio: float, k: int) -> tuple[Tensor, Tensor]:
    """See `atomas_kernels.dpc_knn`."""
    counts = cluster_counts(lengths, ratio)
    assignment: Tensor = _cluster(machine.single(tokens), lengths, counts, k)
    return assignment, counts


def cluster_merge(
    tokens: Tensor, weight: Tensor, assignment: Tensor, lengths: Tensor, cluster_lengths: Tensor
) -> Tensor:
    """See `atomas_kernels.cluster_merge`."""
    merged: Tensor = _merge(
        machine.single(tokens), machine.single(weight), assignment.contiguous(), lengths, cluster_lengths
    )[0]
    return merged.to(tokens.dtype)


@custom_op("atomas_kernels::dpc_knn", mutates_args=(), device_types="cpu")
def _cluster(tokens: Tensor, lengths: Tensor, counts: Tensor, k: int) -> Tensor:
    sizes = checks.segment_sizes("lengths", lengths, tokens.shape[0])
    assignment = lengths.new_empty(tokens.shape[0])
    addresses = (tokens.data_ptr(), assignment.data_ptr())
    _native.cluster(
        machine.instruction_set, machine.threads(), tokens.shape[1], k, sizes, counts.tolist(), *addresses
    )
    return assignment


@_cluster.register_fake
def _(tokens: Tensor, lengths: Tensor, counts: Tensor, k: int) -> Tensor:
    return lengths.new_empty(tokens.shape[0])


@custom_op("atomas_kernels::cluster_merge", mutates_args=(), device_types="cpu")
def _merge(
    tokens: Tensor, weight: Tensor, assignment: Tensor, lengths: Tensor, cluster_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Merged tokens [sum K_i, D] and the denominators [sum K_i]."""
    sizes = checks.segment_sizes("lengths", lengths, tokens.shape[0])
    total = int(cluster_lengths.sum())
    counts = checks.segment_sizes("cluster_lengths", cluster_lengths, total)
    checks.index_range("assignment", assignment, cluster_lengths.repeat_interleave(lengths))
    merged, weight_sum = tokens.new_empty(total, tokens.shape[1]), tokens.new_empty(total)
    addresses = (x.data_ptr() for x in (tokens, weight, assignment, merged, weight_sum))
    _native.merge_forward(
        machine.instruction_set, machine.threads(), tokens.shape[1], sizes, counts, *addresses
    )
    return merged, weight_sum


@_merge.register_fake
def _(
    tokens: Tensor, weight: Tensor, assignment: Tensor, lengths: Tensor, cluster_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    total = get_ctx().new_dynamic_size()
    return tokens.new_empty(total, tokens.shape[1]), tokens.new_empty(total)


@custom_op("atomas_kernels::cluster_merge_backward", mutates_args=(), device_types="cpu")
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
    gradients = torch.empty_like(tokens), torch.empty_like(weight)
    tensors = (tokens, weight, assignment, merged, weight_sum, grad_merged, *gradients)
    _native.merge_backward(
        machine.instruction_set,
        machine.threads(),
        tokens.shape[1],
        lengths.tolist(),
        cluster_lengths.tolist(),
        *(x.data_ptr() for x in tensors),
    )
    return gradients


@_merge_backward.register_fake
def _(grad_merged: Tensor, tokens: Tensor, weight: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(tokens), torch.empty_like(weight)


def _merge_setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _merge_gradient(ctx: Any, grad_merged: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_merge_backward(grad_merged.contiguous(), *ctx.saved_tensors), None, None, None


_merge.register_autograd(_merge_gradient, setup_context=_merge_setup)
