"""Scores of the token interaction, and what travels between the ranks for them.

Tokens are rounded once, to what the run's matrix products take, before they are sent or scored: own and foreign ones
alike, so that a score does not depend on the rank that computes it. Importance weights, scores and all gradients are
float32 (float64 where tokens are), also between ranks and in sums over tiles; autograd rounds the gradient of
half-precision tokens when it is complete.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atomas.distributed.collectives import all_gather_rows, reduce_scatter_rows
from atomas.model.layers import full_precision
from atomas_kernels import token_interaction

Tokens = tuple[Tensor, Tensor]
"""[T, D] tokens and their [T] importance weights."""


def score(own: Tokens, others: Tokens, own_lengths: Tensor, lengths: Tensor) -> Tensor:
    """Weighted token interaction S [A, C] of A sequences with C of the other modality (method section 3.2)."""
    with full_precision(own_lengths.device):
        return token_interaction(own[0], others[0], own[1], others[1], own_lengths, lengths)


def join_rows(tokens: Tensor, weight: Tensor) -> Tensor:
    """Tokens [T, D] and their weights [T] in one tensor, which takes one collective to send; no gradient.

    Returns:
        [T, D + 1]; for half-precision tokens [T, D + 2], where the last two hold the bits of the float32 weight.
    """
    return torch.cat([tokens.detach(), weight.detach()[:, None].view(tokens.dtype)], dim=1)


def split_rows(rows: Tensor) -> Tokens:
    """Counterpart of `join_rows`."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    tokens, weight = rows.tensor_split([-dtype.itemsize // rows.itemsize], dim=1)
    # a single row would pass for contiguous where it is, and not be aligned as a float32
    own = weight.clone(memory_format=torch.contiguous_format)
    return tokens.contiguous(), own.view(dtype).flatten()


def as_leaves(tokens: Tensor, weight: Tensor) -> Tokens:
    """The same values, to be differentiated with float32 gradients."""
    leaves = tokens.detach().requires_grad_(), weight.detach().requires_grad_()
    leaves[0].grad_dtype = weight.dtype
    return leaves


class _BlockScores(torch.autograd.Function):
    """Its own graph inside, because autograd would round what each rank sends back of half-precision tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        own_tokens: Tensor,
        own_weight: Tensor,
        sent_tokens: Tensor,
        sent_weight: Tensor,
        lengths: tuple[Tensor, Tensor],
        sizes: Sequence[int],
        what: str,
        differentiable: bool,
    ) -> Tensor:
        rows = all_gather_rows(join_rows(sent_tokens, sent_weight), sizes, what)
        own, others = as_leaves(own_tokens, own_weight), as_leaves(*split_rows(rows))
        with torch.set_grad_enabled(differentiable):
            scores = score(own, others, *lengths)
        ctx.scores, ctx.leaves, ctx.sizes, ctx.what = scores, (*own, *others), sizes, what
        return scores.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_own, of_own_weight, *of_others = torch.autograd.grad(ctx.scores, ctx.leaves, grads[0])
        of_rows = join_rows(*of_others)
        del of_others, ctx.scores, ctx.leaves  # the tokens of all ranks, and their gradients
        of_sent = reduce_scatter_rows(of_rows, ctx.sizes, f"gradient of {ctx.what}")
        return of_own, of_own_weight, *split_rows(of_sent), None, None, None, None


def block_scores(
    own: Tokens, sent: Tokens, own_lengths: Tensor, lengths: Tensor, sizes: Sequence[int], *, what: str
) -> Tensor:
    """Scores [b, B] of this rank's own sequences with those of the other modality of all ranks. Collective.

    Args:
        own: of b sequences; differentiable.
        sent: of this rank's b sequences of the other modality; differentiable: each rank gets the sum of what all send
            back for its own (see `atomas.distributed.gather` for what that makes of a mean over ranks).
        own_lengths: [b] int64.
        lengths: [B] int64 of all ranks' sequences.
        sizes: tokens that each rank sends.
        what: name of what is sent, for people.
    """
    if len(sizes) == 1:
        return score(own, sent, own_lengths, lengths)
    scores: Tensor = _BlockScores.apply(
        *own, *sent, (own_lengths, lengths), tuple(sizes), what, torch.is_grad_enabled()
    )
    return scores
