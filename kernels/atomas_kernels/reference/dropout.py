"""Dropout by torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

_DRAWS = 1 << 16
"""Values of one random int16."""


def dropout(values: Tensor, rate: float) -> Tensor:
    """See `atomas_kernels.dropout`. On the CPU the rate is rounded to a multiple of 2^-16, and a mask is kept.

    torch draws a 64-bit number for every value there, which costs more than the layers between the dropouts; here one
    makes four decisions.
    """
    dropped = round(rate * _DRAWS)
    if dropped in (0, _DRAWS) or values.device.type != "cpu":
        return F.dropout(values, rate)
    numbers = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    draws = numbers.view(torch.int16)[: values.numel()].view(values.shape)
    return (values * (draws >= dropped - _DRAWS // 2)).mul_(_DRAWS / (_DRAWS - dropped))
