"""Soft-target contrastive cross entropy without a logits matrix, forward or backward (kernels.md 3.3).

A tile of keys, of the batch or of the queue, gives student and teacher logits from one read; the backward pass
computes the tiles again.

`info_nce` has no kernel: its scores [A, A] exist already, as the sum of the levels, and two log-sum-exps over them
are a fraction of the interaction that made them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from atomas_kernels import checks
from atomas_kernels.triton import contrastive_backward as backward
from atomas_kernels.triton import contrastive_forward as forward
from atomas_kernels.triton.contrastive_tiles import Operands


def contrastive_cross_entropy(
    query: Tensor,
    momentum_query: Tensor,
    keys: Tensor,
    positive: Tensor,
    temperature: Tensor,
    *,
    alpha: float,
    queue: Tensor | None,
    ignore: Tensor | None,
) -> Tensor:
    """See `atomas_kernels.contrastive_cross_entropy`. A queue of another dtype is rounded to the query's, tile by
    tile.
    """
    if not len(query):
        return (query.float() * temperature.float()).sum()
    inputs = (query, momentum_query.detach(), keys, temperature.float())
    loss: Tensor = _forward(*(x.contiguous() for x in inputs), positive, alpha, queue, ignore)[0]
    return loss


@custom_op("atomas_kernels::triton_contrastive", mutates_args=())
def _forward(
    query: Tensor,
    momentum: Tensor,
    keys: Tensor,
    temperature: Tensor,
    positive: Tensor,
    alpha: float,
    queue: Tensor | None,
    ignore: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Loss, and what the backward pass needs of each row [3, b]: see `merge_kernel`."""
    checks.index_range("positive", positive, len(keys))
    return forward.run(Operands(query, momentum, keys, temperature, positive, queue, ignore), alpha)


@_forward.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty((), dtype=torch.float32), query.new_empty(3, len(query), dtype=torch.float32)


@custom_op("atomas_kernels::triton_contrastive_backward", mutates_args=())
def _backward(
    query: Tensor,
    momentum: Tensor,
    keys: Tensor,
    temperature: Tensor,
    positive: Tensor,
    alpha: float,
    queue: Tensor | None,
    ignore: Tensor | None,
    statistics: Tensor,
    grad_loss: Tensor,
    need_keys: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, temperature and keys; the last one is empty unless `need_keys`."""
    operands = Operands(query, momentum, keys, temperature, positive, queue, ignore)
    grad_query, grad_keys = backward.run(operands, alpha, statistics, need_keys=need_keys)
    scale = grad_loss / (len(query) * temperature)
    grad_keys = keys.new_empty(0) if grad_keys is None else (grad_keys * scale).to(keys.dtype)
    return (grad_query * scale).to(query.dtype), -scale * statistics[2].sum(), grad_keys


@_backward.register_fake
def _(query: Tensor, momentum: Tensor, keys: Tensor, temperature: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    grad_keys = torch.empty_like(keys) if rest[-1] else keys.new_empty(0)
    return torch.empty_like(query), torch.empty_like(temperature), grad_keys


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.alpha, queue, ignore = inputs
    ctx.save_for_backward(*tensors, queue, ignore, output[1])


def _gradient(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, queue, ignore, statistics = ctx.saved_tensors
    need_keys = ctx.needs_input_grad[2]
    grad_query, grad_temperature, grad_keys = _backward(
        *tensors, ctx.alpha, queue, ignore, statistics, grad_loss, need_keys
    )
    return grad_query, None, grad_keys if need_keys else None, grad_temperature, *(None,) * 4


_forward.register_autograd(_gradient, setup_context=_setup)
