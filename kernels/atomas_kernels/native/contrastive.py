"""Soft-target contrastive cross entropy (csrc/cpu/contrastive.cpp).

The gradients of the query and the temperature come out of the forward pass, which has the keys in the cache; that
of the keys, wanted rarely, takes a second pass over the keys alone.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from atomas_kernels import _native, checks
from atomas_kernels.native import machine


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
    """See `atomas_kernels.contrastive_cross_entropy`. A float64 queue is copied, any other is read in place."""
    with_gradients = torch.is_grad_enabled() and (query.requires_grad or temperature.requires_grad)
    loss: Tensor = _contrastive(
        machine.single(query),
        machine.single(momentum_query.detach()),
        _rows(keys),
        positive.contiguous(),
        temperature.float(),
        None if queue is None else _rows(queue),
        None if ignore is None else ignore.contiguous(),
        alpha,
        with_gradients,
    )[0]
    return loss


def _rows(keys: Tensor) -> Tensor:
    """With neighbouring columns."""
    keys = keys.float() if keys.dtype == torch.float64 else keys
    return keys if keys.stride(1) == 1 else keys.contiguous()


@custom_op("atomas_kernels::contrastive_cross_entropy", mutates_args=(), device_types="cpu")
def _contrastive(
    query: Tensor,
    momentum_query: Tensor,
    keys: Tensor,
    positive: Tensor,
    temperature: Tensor,
    queue: Tensor | None,
    ignore: Tensor | None,
    alpha: float,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss; logarithms of both softmax denominators [2, b]; gradients of query and temperature, or empty."""
    checks.index_range("positive", positive, keys.shape[0])
    outputs = _empty_outputs(query, with_gradients)
    loss, normalizer, *gradients = outputs
    if query.shape[0] == 0:
        loss.zero_()
        return outputs
    _native.contrastive_forward(
        *_problem(query, momentum_query, keys, positive, temperature, queue, ignore, alpha),
        loss.data_ptr(),
        normalizer.data_ptr(),
        *(x.data_ptr() if with_gradients else 0 for x in gradients),
    )
    return outputs


def _problem(
    query: Tensor,
    momentum_query: Tensor,
    keys: Tensor,
    positive: Tensor,
    temperature: Tensor,
    queue: Tensor | None,
    ignore: Tensor | None,
    alpha: float,
) -> tuple[Any, ...]:
    """The first arguments of both kernels."""
    return (
        machine.instruction_set,
        machine.threads(),
        *query.shape,
        alpha,
        temperature.item(),
        *(
            (machine.dtype_name(x), x.data_ptr(), x.shape[0], x.stride(0))
            for x in (keys, keys[:0] if queue is None else queue)
        ),
        query.data_ptr(),
        momentum_query.data_ptr(),
        positive.data_ptr(),
        0 if ignore is None else ignore.data_ptr(),
    )


def _empty_outputs(query: Tensor, with_gradients: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_query = torch.empty_like(query) if with_gradients else query.new_empty(0, 0)
    return query.new_empty(()), query.new_empty(2, query.shape[0]), grad_query, query.new_zeros(1)


@_contrastive.register_fake
def _(
    query: Tensor,
    momentum_query: Tensor,
    keys: Tensor,
    positive: Tensor,
    temperature: Tensor,
    queue: Tensor | None,
    ignore: Tensor | None,
    alpha: float,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(query, with_gradients)


@custom_op("atomas_kernels::contrastive_key_gradient", mutates_args=(), device_types="cpu")
def _key_gradient(
    query: Tensor,
    momentum_query: Tensor,
    keys: Tensor,
    positive: Tensor,
    temperature: Tensor,
    queue: Tensor | None,
    ignore: Tensor | None,
    normalizer: Tensor,
    alpha: float,
) -> Tensor:
    """[M, D] float32, of a loss with gradient 1."""
    gradient = keys.new_zeros(keys.shape, dtype=torch.float32)
    if query.shape[0] > 0:
        problem = _problem(query, momentum_query, keys, positive, temperature, queue, ignore, alpha)
        _native.contrastive_key_gradient(*problem, normalizer.data_ptr(), gradient.data_ptr())
    return gradient


@_key_gradient.register_fake
def _(query: Tensor, momentum_query: Tensor, keys: Tensor, *_: Any) -> Tensor:
    return keys.new_empty(keys.shape, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.alpha, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _gradient(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, normalizer, grad_query, grad_temperature = ctx.saved_tensors
    of_query, of_keys, of_temperature = (ctx.needs_input_grad[i] for i in (0, 2, 4))
    grad_keys = None
    if of_keys:
        keys = tensors[2]
        grad_keys = (grad_loss * _key_gradient(*tensors, normalizer, ctx.alpha)).to(keys.dtype)
    return (
        grad_loss * grad_query if of_query else None,
        None,
        grad_keys,
        None,
        grad_loss * grad_temperature if of_temperature else None,
        *[None] * 4,
    )


_contrastive.register_autograd(_gradient, setup_context=_setup)
