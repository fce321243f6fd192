"""Weighted token interaction (csrc/cpu/interaction_forward.cpp and interaction_backward.cpp)."""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from atomas_kernels import _native, checks
from atomas_kernels.native import machine

_LONGEST = 2**15 - 1
"""Matches are kept as int16."""

saved_match_bytes = 64 * 2**20
"""Matches of up to this size are saved for the backward pass. They grow with the square of the batch; above it the
backward pass finds them again, which costs another forward pass and memory linear in the tokens. The gradients
are bitwise the same."""


def token_interaction(
    text: Tensor,
    smiles: Tensor,
    text_weight: Tensor,
    smiles_weight: Tensor,
    text_lengths: Tensor,
    smiles_lengths: Tensor,
) -> Tensor:
    """See `atomas_kernels.token_interaction`. Sequences of up to 32767 tokens."""
    inputs = (
        text.contiguous(),
        smiles.contiguous(),
        machine.single(text_weight),
        machine.single(smiles_weight),
    )
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    matches = text.shape[0] * smiles_lengths.shape[0] + smiles.shape[0] * text_lengths.shape[0]
    save_matches = differentiable and matches * torch.int16.itemsize <= saved_match_bytes
    scores: Tensor = _interaction(*inputs, text_lengths, smiles_lengths, save_matches)[0]
    return scores


@custom_op("atomas_kernels::token_interaction", mutates_args=(), device_types="cpu")
def _interaction(
    text: Tensor,
    smiles: Tensor,
    text_weight: Tensor,
    smiles_weight: Tensor,
    text_lengths: Tensor,
    smiles_lengths: Tensor,
    save_matches: bool,
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
    outputs = _empty_outputs(text, smiles, len(sizes[0]), len(sizes[1]), save_matches)
    scores, *matches = outputs
    _native.interaction_forward(
        machine.instruction_set,
        machine.threads(),
        machine.dtype_name(text),
        text.shape[1],
        *sizes,
        *(x.data_ptr() for x in (text, smiles, text_weight, smiles_weight, scores)),
        *(x.data_ptr() if save_matches else 0 for x in matches),
    )
    return outputs


def _empty_outputs(
    text: Tensor, smiles: Tensor, texts: int, molecules: int, save_matches: bool
) -> tuple[Tensor, Tensor, Tensor]:
    text_shape, smiles_shape = (molecules, text.shape[0]), (texts, smiles.shape[0])
    if not save_matches:
        text_shape = smiles_shape = (0, 0)
    # Zeros: nothing is written for the pairs that have an empty side.
    return (
        text.new_empty(texts, molecules, dtype=torch.float32),
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
    save_matches: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(text, smiles, text_lengths.shape[0], smiles_lengths.shape[0], save_matches)


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
    """Gradients of the first four inputs of `_interaction`, float32; autograd rounds those of half-precision tokens."""
    inputs = (text, smiles, text_weight, smiles_weight)
    gradients = [torch.empty_like(x, dtype=torch.float32) for x in inputs]
    _native.interaction_backward(
        machine.instruction_set,
        machine.threads(),
        machine.dtype_name(text),
        text.shape[1],
        text_lengths.tolist(),
        smiles_lengths.tolist(),
        *(x.data_ptr() for x in (*inputs, grad_scores, text_match, smiles_match, *gradients)),
    )
    grad_text, grad_smiles, grad_text_weight, grad_smiles_weight = gradients
    return grad_text, grad_smiles, grad_text_weight, grad_smiles_weight


@_interaction_backward.register_fake
def _(
    grad_scores: Tensor,
    text: Tensor,
    smiles: Tensor,
    text_weight: Tensor,
    smiles_weight: Tensor,
    *_: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_text, grad_smiles = (torch.empty_like(x, dtype=torch.float32) for x in (text, smiles))
    return grad_text, grad_smiles, torch.empty_like(text_weight), torch.empty_like(smiles_weight)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], *output[1:])


def _gradient(ctx: Any, grad_scores: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *_interaction_backward(grad_scores.contiguous(), *ctx.saved_tensors), None, None, None


_interaction.register_autograd(_gradient, setup_context=_setup)
