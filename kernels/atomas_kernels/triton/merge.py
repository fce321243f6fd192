"""Weighted mean of every cluster and its gradient, without atomics (method.md 3.1, step 3).

Forward: a product of each sequence's weighted one-hot assignment with its tokens on tensor cores, where an index_add
would add in any order. It is bound by memory: a sequence of N tokens with K clusters costs 2 K N D operations for
N D values read (K / 2 per byte of float32; K is about 27 for a text of ChEBI-20), so 256 sequences of 106 tokens at
D = 768 are 42 MB of bfloat16 in and 21 MB of float32 out, 15 us at 4 TB/s. Beyond 32 clusters the tokens are read
once for each 32, from the cache. Backward: every token reads the gradient and the mean of its own cluster.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op, get_ctx

from atomas_kernels import checks
from atomas_kernels.triton.variants import DTYPES, Variant, launch_options

_FORWARD = {"BLOCK_CLUSTERS": 32, "BLOCK_TOKENS": 32, "BLOCK_WIDTH": 64}
_BACKWARD = {"ROWS": 32, "BLOCK_WIDTH": 128}
_FLOOR = tl.constexpr(1e-6)


def cluster_merge(
    tokens: Tensor, weight: Tensor, assignment: Tensor, lengths: Tensor, cluster_lengths: Tensor
) -> Tensor:
    """See `atomas_kernels.cluster_merge`. Sums are float32; products are tf32 in three parts, close to float32."""
    inputs = (tokens, weight.float(), assignment, lengths, cluster_lengths)
    merged: Tensor = _merge(*(x.contiguous() for x in inputs))[0]
    return merged.to(tokens.dtype)


@custom_op("atomas_kernels::triton_merge", mutates_args=())
def _merge(
    tokens: Tensor, weight: Tensor, assignment: Tensor, lengths: Tensor, cluster_lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Merged tokens [sum K_i, D] and denominators [sum K_i], both float32, and the cluster of each token among all
    [T].
    """
    count, (total, width) = lengths.shape[0], tokens.shape
    ends, cluster_ends = lengths.cumsum(0), cluster_lengths.cumsum(0)
    place = torch.arange(total, device=tokens.device)
    sequence = torch.searchsorted(ends, place, right=True).clamp(max=max(count - 1, 0))
    if count:
        foreign = (assignment < 0) | (assignment >= cluster_lengths[sequence])
        cluster = (cluster_ends - cluster_lengths)[sequence] + assignment
    else:
        foreign, cluster = assignment != assignment, assignment.clone()
    # The only transfer to the host.
    sizes = torch.cat((lengths, cluster_lengths, foreign.any().view(1))).cpu()
    checks.segment_sizes("lengths", sizes[:count], total)
    clusters = int(sizes[count:-1].sum())
    checks.segment_sizes("cluster_lengths", sizes[count:-1], clusters)
    if sizes[-1]:
        raise ValueError("assignment: an index is out of range")

    merged = torch.empty(clusters, width, device=tokens.device)
    denominator = torch.empty(clusters, device=tokens.device)
    if clusters and width:
        merge_kernel[(count, triton.cdiv(width, _FORWARD["BLOCK_WIDTH"]))](
            tokens, weight, assignment, lengths, ends, cluster_lengths, cluster_ends, merged, denominator, width,
            **_FORWARD, **launch_options(4, 2),
        )  # fmt: skip
    return merged, denominator, cluster


@_merge.register_fake
def _(
    tokens: Tensor, weight: Tensor, assignment: Tensor, lengths: Tensor, cluster_lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    clusters = get_ctx().new_dynamic_size()
    merged = tokens.new_empty(clusters, tokens.shape[1], dtype=torch.float32)
    return merged, merged.new_empty(clusters), torch.empty_like(assignment)


@custom_op("atomas_kernels::triton_merge_backward", mutates_args=())
def _merge_backward(
    grad_merged: Tensor, tokens: Tensor, weight: Tensor, merged: Tensor, denominator: Tensor, cluster: Tensor
) -> tuple[Tensor, Tensor]:
    grad_tokens, grad_weight = torch.empty_like(tokens), torch.empty_like(weight)
    total, width = tokens.shape
    if total:
        merge_gradient_kernel[(triton.cdiv(total, _BACKWARD["ROWS"]),)](
            grad_merged.contiguous(), tokens, weight, merged, denominator, cluster, grad_tokens, grad_weight,
            total, width, **_BACKWARD, **launch_options(4, 1),
        )  # fmt: skip
    return grad_tokens, grad_weight


@_merge_backward.register_fake
def _(grad_merged: Tensor, tokens: Tensor, weight: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(tokens), torch.empty_like(weight)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], *output)


def _gradient(ctx: Any, grad_merged: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *_merge_backward(grad_merged, *ctx.saved_tensors), None, None, None


_merge.register_autograd(_gradient, setup_context=_setup)


@triton.jit
def merge_kernel(  # type: ignore[no-untyped-def]
    tokens,
    weight,
    assignment,
    lengths,
    ends,
    cluster_lengths,
    cluster_ends,
    merged,
    denominator,
    width,
    BLOCK_CLUSTERS: tl.constexpr,  # noqa: N803
    BLOCK_TOKENS: tl.constexpr,  # noqa: N803
    BLOCK_WIDTH: tl.constexpr,  # noqa: N803
):
    """All clusters of one sequence, part of the width."""
    sequence = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    length = tl.load(lengths + sequence).to(tl.int32)
    begin = tl.load(ends + sequence) - length
    clusters = tl.load(cluster_lengths + sequence).to(tl.int32)
    target = tl.load(cluster_ends + sequence) - clusters
    tokens += begin * width
    merged += target * width
    for first_cluster in range(0, clusters, BLOCK_CLUSTERS):
        cluster = first_cluster + tl.arange(0, BLOCK_CLUSTERS)
        total = tl.zeros((BLOCK_CLUSTERS, BLOCK_WIDTH), dtype=tl.float32)
        weights = tl.zeros((BLOCK_CLUSTERS,), dtype=tl.float32)
        for first in range(0, length, BLOCK_TOKENS):
            token = first + tl.arange(0, BLOCK_TOKENS)
            w = tl.load(weight + begin + token, mask=token < length, other=0.0)
            label = tl.load(assignment + begin + token, mask=token < length, other=-1).to(tl.int32)
            share = tl.where(label[None, :] == cluster[:, None], w[None, :], 0.0)
            inside = (token < length)[:, None] & (column < width)[None, :]
            x = tl.load(tokens + token[:, None] * width + column[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
            finite = tl.abs(x) < float("inf")
            total = tl.dot(share, tl.where(finite, x, 0.0), total, input_precision="tf32x3")
            weights += tl.sum(share, axis=1)
            if tl.min(tl.min(finite.to(tl.int32), axis=1), axis=0) == 0:
                # 0 x NaN is NaN: what is not finite is added to its own cluster alone.
                for other in range(first, tl.minimum(first + BLOCK_TOKENS, length)):
                    y = tl.load(tokens + other * width + column, mask=column < width, other=0.0).to(
                        tl.float32
                    )
                    y = tl.where(tl.abs(y) < float("inf"), 0.0, y * tl.load(weight + begin + other))
                    member = cluster == tl.load(assignment + begin + other).to(tl.int32)
                    total += tl.where(member[:, None], y[None, :], 0.0)
        weights += _FLOOR
        exists = cluster < clusters
        inside = exists[:, None] & (column < width)[None, :]
        tl.store(merged + cluster[:, None] * width + column[None, :], total / weights[:, None], mask=inside)
        if tl.program_id(1) == 0:
            tl.store(denominator + target + cluster, weights, mask=exists)


@triton.jit(do_not_specialize=["total"])
def merge_gradient_kernel(  # type: ignore[no-untyped-def]
    grad_merged,
    tokens,
    weight,
    merged,
    denominator,
    cluster,
    grad_tokens,
    grad_weight,
    total,
    width,
    ROWS: tl.constexpr,  # noqa: N803
    BLOCK_WIDTH: tl.constexpr,  # noqa: N803
):
    """Some tokens: w g / W and <x - mean, g> / W, with g the gradient of the own cluster's mean."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = row < total
    own = tl.load(cluster + row, mask=present, other=0)
    inverse = 1.0 / tl.load(denominator + own, mask=present, other=1.0)
    share = tl.load(weight + row, mask=present, other=0.0) * inverse
    along = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(0, width, BLOCK_WIDTH):
        column = first + tl.arange(0, BLOCK_WIDTH)
        inside = present[:, None] & (column < width)[None, :]
        here = row.to(tl.int64)[:, None] * width + column[None, :]
        there = own[:, None] * width + column[None, :]
        g = tl.load(grad_merged + there, mask=inside, other=0.0)
        x = tl.load(tokens + here, mask=inside, other=0.0).to(tl.float32)
        along += tl.sum((x - tl.load(merged + there, mask=inside, other=0.0)) * g, axis=1)
        tl.store(grad_tokens + here, (g * share[:, None]).to(grad_tokens.dtype.element_ty), mask=inside)
    tl.store(grad_weight + row, along * inverse, mask=present)


def variants(architecture: int) -> Iterator[Variant]:
    """See `variants.py`."""
    for dtype in DTYPES:
        signature = {"tokens": f"*{dtype}", "weight": "*fp32", "merged": "*fp32", "denominator": "*fp32"}
        indices = ("assignment", "lengths", "ends", "cluster_lengths", "cluster_ends")
        yield Variant(
            name=f"cluster_merge[{dtype}]",
            kernel=merge_kernel,
            signature=signature | dict.fromkeys(indices, "*i64") | {"width": "i32:16"},
            constants=dict(_FORWARD),
            options=launch_options(4, 2),
            tensor_cores=True,
        )
        results = {"grad_merged": "*fp32", "grad_tokens": f"*{dtype}", "grad_weight": "*fp32"}
        yield Variant(
            name=f"cluster_merge_gradient[{dtype}]",
            kernel=merge_gradient_kernel,
            signature=signature | results | {"cluster": "*i64", "total": "i32", "width": "i32:16"},
            constants=dict(_BACKWARD),
            options=launch_options(4, 1),
            tensor_cores=False,
        )
