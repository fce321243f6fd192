"""Operators of the compiled CUDA library, declared to torch so that torch.compile sees them.

The library has a C interface and its own CUDA runtime, so one build serves every version of torch, and it loads
where there is no GPU. Importing this module raises ImportError where it was not built. Tokens and sources of
half precision are computed in float32; every run gives the same bits.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from atomas_kernels import checks
from atomas_kernels.reference.clustering import cluster_counts

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`atomas::Dtype` of csrc/cuda/common.h."""

_LONGEST = 361 * 64
"""A grid is at most 65535 tiles high: those of 361 * 362 / 2 pairs of 64 tokens."""


def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"the CUDA library was not built or does not load: {error}") from error
    return library


_library = _load(Path(__file__).with_name("libatomas_cuda.so"))


def dpc_knn(tokens: Tensor, lengths: Tensor, *, ratio: float, k: int) -> tuple[Tensor, Tensor]:
    """See `atomas_kernels.dpc_knn`. Sequences of up to 23104 tokens; holds a float32 per pair of tokens of one."""
    counts = cluster_counts(lengths, ratio)
    assignment: Tensor = _cluster(tokens.contiguous(), lengths.contiguous(), counts, k)
    return assignment, counts


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
    _interpolate(
        list(targets),
        [source.contiguous() if source.dtype in _DTYPES else source.float() for source in sources],
        1 - momentum,
    )


@custom_op("atomas_kernels::cuda_dpc_knn", mutates_args=(), device_types="cuda")
def _cluster(tokens: Tensor, lengths: Tensor, counts: Tensor, k: int) -> Tensor:
    sizes = checks.segment_sizes("lengths", lengths, tokens.shape[0])
    total, width = tokens.shape
    assignment = lengths.new_empty(total)
    if total == 0:
        return assignment
    if max(sizes) > _LONGEST:
        raise ValueError(f"lengths: the native backend takes sequences of up to {_LONGEST} tokens on CUDA")
    squares = tokens.new_empty(sum(size * size for size in sizes), dtype=torch.float32)
    findings = tokens.new_empty(4 * total, dtype=torch.float32)
    ends = torch.stack((lengths, lengths.square())).cumsum(dim=1)
    _run(
        "dpc_knn",
        tokens,
        ctypes.c_uint8(_DTYPES[tokens.dtype]),
        *(_pointer(x) for x in (tokens, lengths, ends, counts)),
        *(ctypes.c_int64(x) for x in (len(sizes), total, max(sizes), width, k)),
        *(_pointer(x) for x in (squares, findings, assignment)),
    )
    return assignment


@_cluster.register_fake
def _(tokens: Tensor, lengths: Tensor, counts: Tensor, k: int) -> Tensor:
    return lengths.new_empty(tokens.shape[0])


@custom_op("atomas_kernels::cuda_momentum_update", mutates_args=("targets",), device_types="cuda")
def _interpolate(targets: list[Tensor], sources: list[Tensor], weight: float) -> None:
    count = len(targets)
    _run(
        "momentum_update",
        targets[0],
        ctypes.c_int64(count),
        (ctypes.c_void_p * count)(*(x.data_ptr() for x in targets)),
        (ctypes.c_void_p * count)(*(x.data_ptr() for x in sources)),
        (ctypes.c_int64 * count)(*(x.numel() for x in targets)),
        (ctypes.c_uint8 * count)(*(_DTYPES[x.dtype] for x in sources)),
        ctypes.c_float(weight),
    )


@_interpolate.register_fake
def _(targets: list[Tensor], sources: list[Tensor], weight: float) -> None:
    return None


def _run(op: str, tensor: Tensor, *arguments: Any) -> None:
    """Queue an operator on the current stream of the tensor's device."""
    with _stream_of(tensor) as (device, stream):
        status = getattr(_library, f"atomas_{op}")(ctypes.c_int(device), ctypes.c_void_p(stream), *arguments)
    if status:
        describe = _library.atomas_error_string
        describe.restype = ctypes.c_char_p
        raise RuntimeError(f"{op}: the CUDA library reports: {describe(status).decode()} (error {status})")


@contextmanager
def _stream_of(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Number of the tensor's device, which is current inside, and the address of its stream."""
    with torch.cuda.device(tensor.device):
        stream = torch.cuda.current_stream()
        yield stream.device_index, stream.cuda_stream


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
