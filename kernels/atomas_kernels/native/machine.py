"""What the compiled kernels run on, and the tensors they take."""

import torch
from torch import Tensor

from atomas_kernels import _native

instruction_set: str = _native.instruction_sets()[0]
"""The fastest that this machine runs, of amx_bf16, avx512, avx2 and baseline."""


def threads() -> int:
    """As many as torch uses."""
    return torch.get_num_threads()


def single(values: Tensor) -> Tensor:
    """Contiguous float32."""
    return values.float().contiguous()


def dtype_name(values: Tensor) -> str:
    """`float32`, `bfloat16` or `float16`."""
    return str(values.dtype).removeprefix("torch.")
