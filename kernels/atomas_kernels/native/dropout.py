"""Dropout in one pass (csrc/cpu/dropout.cpp): no mask is kept, the backward pass draws the same one again."""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from atomas_kernels import _native
from atomas_kernels.native import machine

_DRAWS = 1 << 32


def rule(rate: float, seed: int) -> tuple[int, int, float]:
    """Seed, of 2^32 draws those that drop a value, and the scale of the others."""
    return seed, min(round(rate * _DRAWS), _DRAWS - 1), 0.0 if rate == 1 else 1 / (1 - rate)


def draw_seed() -> int:
    """A number of torch's generator, from which all of a mask follows."""
    return int(torch.randint(2**63 - 1, ()))


def dropout(values: Tensor, rate: float) -> Tensor:
    """See `atomas_kernels.dropout`. The rate is rounded to a multiple of 2^-32."""
    dropped: Tensor = _dropout(values.float().contiguous(), rate, draw_seed())
    return dropped.to(values.dtype)


@custom_op("atomas_kernels::dropout", mutates_args=(), device_types="cpu")
def _dropout(values: Tensor, rate: float, seed: int) -> Tensor:
    output = torch.empty_like(values)
    addresses = values.data_ptr(), output.data_ptr()
    _native.dropout(machine.instruction_set, machine.threads(), rule(rate, seed), values.numel(), *addresses)
    return output


@_dropout.register_fake
def _(values: Tensor, rate: float, seed: int) -> Tensor:
    return torch.empty_like(values)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.rule = inputs[1:]


def _gradient(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
    return _dropout(grad_output.contiguous(), *ctx.rule), None, None


_dropout.register_autograd(_gradient, setup_context=_setup)
