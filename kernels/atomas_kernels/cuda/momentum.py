"""The momentum update (csrc/cuda/momentum.cu)."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from atomas_kernels.cuda import library


@torch.no_grad()
def momentum_update(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float) -> None:
    """See `atomas_kernels.momentum_update`. All tensors on one device, the targets contiguous."""
    for index, target in enumerate(targets):
        if target.device != targets[0].device:
            raise ValueError(
                f"targets: tensor {index} is on {target.device}, the first on {targets[0].device}"
            )
        if not target.is_contiguous():
            raise ValueError(f"targets: tensor {index} is not contiguous")
    readable = [source if source.dtype in library.DTYPES else source.float() for source in sources]
    _interpolate(list(targets), [source.contiguous() for source in readable], 1 - momentum)


@custom_op("atomas_kernels::cuda_momentum_update", mutates_args=("targets",), device_types="cuda")
def _interpolate(targets: list[Tensor], sources: list[Tensor], weight: float) -> None:
    count = len(targets)
    library.run(
        "momentum_update",
        targets[0],
        count,
        (ctypes.c_void_p * count)(*(x.data_ptr() for x in targets)),
        (ctypes.c_void_p * count)(*(x.data_ptr() for x in sources)),
        (ctypes.c_int64 * count)(*(x.numel() for x in targets)),
        (ctypes.c_uint8 * count)(*(library.DTYPES[x.dtype] for x in sources)),
        ctypes.c_float(weight),
    )


@_interpolate.register_fake
def _(targets: list[Tensor], sources: list[Tensor], weight: float) -> None:
    return None
