"""Operators of the compiled CPU module, declared to torch so that autograd and torch.compile see them.

Tokens of half precision are computed in float32. Importing this module raises ImportError where `_native` was
not built. Results are bitwise the same for every number of threads (`torch.get_num_threads`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, get_ctx

from atomas_kernels import _native, checks
from atomas_kernels.reference.clustering import cluster_counts

_LONGEST = 2**15 - 1
"""Matches are kept as int16."""

instruction_set: str = _native.instruction_sets()[0]
"""The fastest that this machine runs, of avx512, avx2 and baseline."""


def token_interaction(
    text: Tensor,
    smiles: Tensor,
    text_weight: Tensor,
    smiles_weight: Tensor,
    text_lengths: Tensor,
    smiles_lengths: Tensor,
) -> Tensor:
    """See `atomas_kernels.token_interaction`. Sequences of up to 32767 tokens."""
    inputs = [_plain(x) for x in (text, smiles, text_weight, smiles_weight)]
    with_matches = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    scores: Tensor = _interaction(*inputs, text_lengths, smiles_lengths, with_matches)[0]
    return scores


def dpc_knn(tokens: Tensor, lengths: Tensor, *, ratio: float, k: int) -> tuple[Tensor, Tensor]:
    """See `atomas_kernels.dpc_knn`."""
    counts = cluster_counts(lengths, ratio)
    assignment: Tensor = _cluster(_plain(tokens), lengths, counts, k)
    return assignment, counts


def cluster_merge(
    tokens: Tensor, weight: Tensor, assignment: Tensor, lengths: Tensor, cluster_lengths: Tensor
) -> Tensor:
    """See `atomas_kernels.cluster_merge`."""
    merged: Tensor = _merge(
        _plain(tokens), _plain(weight), assignment.contiguous(), lengths, cluster_lengths
    )[0]
    return merged.to(tokens.dtype)


def _plain(values: Tensor) -> Tensor:
    return values.float().contiguous()


def _threads() -> int:
    return torch.get_num_threads()


@custom_op("atomas_kernels::token_interaction", mutates_args=(), device_types="cpu")
def _interaction(
    text: Tensor,
    smiles: Tensor,
    text_weight: Tensor,
    smiles_weight: Tensor,
    text_lengths: Tensor,
    smiles_lengths: Tensor,
    with_matches: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [A, Bc]; the best SMILES token of each text token [Bc, T_t] and the reverse [A, T_s], or
    empty.
    """
    sizes = (
        checks.segment_sizes("text_lengths", text_lengths, text.shape[0]),
        checks.segment_sizes("smiles_lengths", smiles_lengths, smiles.shape[0]),
    )
    for name, side in zip(("text_lengths", "smiles_lengths"), sizes, strict=True):
        if max(side, default=0) > _LONGEST:
            raise ValueError(f"{name}: the native backend takes sequences of up to {_LONGEST} tokens")
    scores, text_match, smiles_match = _empty_outputs(
        text, smiles, len(sizes[0]), len(sizes[1]), with_matches
    )
    _native.interaction_forward(
        instruction_set,
        _threads(),
        text.shape[1],
        *sizes,
        *(x.data_ptr() for x in (text, smiles, text_weight, smiles_weight, scores)),
        *(x.data_ptr() if with_matches else 0 for x in (text_match, smiles_match)),
    )
    return scores, text_match, smiles_match


def _empty_outputs(
    text: Tensor, smiles: Tensor, texts: int, molecules: int, with_matches: bool
) -> tuple[Tensor, Tensor, Tensor]:
    text_shape, smiles_shape = (molecules, text.shape[0]), (texts, smiles.shape[0])
    if not with_matches:
        text_shape = smiles_shape = (0, 0)
    # Zeros: nothing is written for the pairs that have an empty side.
    return (
        text.new_empty(texts, molecules),
        text.new_zeros(text_shape, dtype=torch.int16),
        text.new_zeros(smiles_shape, dtype=torch.int16),
    )


@_interaction.register_fake
def _(
    text: Tensor,
    smiles: Tensor,
    text_weight: Tensor,
    smiles_weight: Tensor,
    text_lengths: Tensor,
    smiles_lengths: Tensor,
    with_matches: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(text, smiles, text_lengths.shape[0], smiles_lengths.shape[0], with_matches)


@custom_op("atomas_kernels::token_interaction_backward", mutates_args=(), device_types="cpu")
def _interaction_backward(
    grad_scores: Tensor,
    text: Tensor,
    smiles: Tensor,
    text_weight: Tensor,
    smiles_weight: Tensor,
    text_lengths: Tensor,
    smiles_lengths: Tensor,
    text_match: Tensor,
    smiles_match: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (text, smiles, text_weight, smiles_weight)
    gradients = _four_like(*inputs)
    _native.interaction_backward(
        instruction_set,
        _threads(),
        text.shape[1],
        text_lengths.tolist(),
        smiles_lengths.tolist(),
        *(x.data_ptr() for x in (*inputs, grad_scores, text_match, smiles_match, *gradients)),
    )
    return gradients


@_interaction_backward.register_fake
def _(grad_scores: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _four_like(*tensors[:4])


def _four_like(
    text: Tensor, smiles: Tensor, text_weight: Tensor, smiles_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    empty = torch.empty_like
    return empty(text), empty(smiles), empty(text_weight), empty(smiles_weight)


def _interaction_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], *output[1:])


def _interaction_gradient(ctx: Any, grad_scores: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *_interaction_backward(grad_scores.contiguous(), *ctx.saved_tensors), None, None, None


_interaction.register_autograd(_interaction_gradient, setup_context=_interaction_setup)


@custom_op("atomas_kernels::dpc_knn", mutates_args=(), device_types="cpu")
def _cluster(tokens: Tensor, lengths: Tensor, counts: Tensor, k: int) -> Tensor:
    sizes = checks.segment_sizes("lengths", lengths, tokens.shape[0])
    assignment = lengths.new_empty(tokens.shape[0])
    addresses = (tokens.data_ptr(), assignment.data_ptr())
    _native.cluster(instruction_set, _threads(), tokens.shape[1], k, sizes, counts.tolist(), *addresses)
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
    _native.merge_forward(instruction_set, _threads(), tokens.shape[1], sizes, counts, *addresses)
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
        instruction_set,
        _threads(),
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
