"""Calls into the CUDA library: arguments, streams and errors."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PATH = Path(__file__).parents[1] / "libatomas_cuda.so"

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`atomas::Dtype` of csrc/cuda/common.h."""


def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"the CUDA library was not built or does not load: {error}") from error
    return library


_library = _load(PATH)


def run(op: str, tensor: Tensor, *arguments: Any) -> None:
    """Queue `atomas_<op>` on the current stream of the tensor's device.

    Tensors become addresses and integers int64; other arguments are ctypes values. Raises RuntimeError, naming
    the operator and the error, if CUDA refuses.
    """
    with _stream_of(tensor) as (device, stream):
        status = getattr(_library, f"atomas_{op}")(
            ctypes.c_int(device), ctypes.c_void_p(stream), *map(_argument, arguments)
        )
    if status:
        describe = _library.atomas_error_string
        describe.restype = ctypes.c_char_p
        raise RuntimeError(f"{op}: the CUDA library reports: {describe(status).decode()} (error {status})")


def dtype(tensor: Tensor) -> ctypes.c_uint8:
    """The tensor's dtype as an argument."""
    return ctypes.c_uint8(DTYPES[tensor.dtype])


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else value


@contextmanager
def _stream_of(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Number of the tensor's device, which is current inside, and the address of its stream."""
    with torch.cuda.device(tensor.device):
        stream = torch.cuda.current_stream()
        yield stream.device_index, stream.cuda_stream
