"""Argument checks of the public operators. Every error names the argument.

Shapes, dtypes and devices are checked by the public functions; values (lengths, indices) by each backend
through `segment_sizes` and `index_range`, so that an operator under torch.compile stays one traced call.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def segment_sizes(name: str, lengths: Tensor, total: int) -> list[int]:
    """Lengths as integers, after checking that none is negative and that they sum to `total` tokens."""
    sizes: list[int] = lengths.tolist()
    if any(size < 0 for size in sizes):
        raise ValueError(f"{name}: negative length {min(sizes)}")
    if sum(sizes) != total:
        raise ValueError(f"{name}: lengths sum to {sum(sizes)}, but there are {total} tokens")
    return sizes


def index_range(name: str, index: Tensor, upper: int | Tensor) -> None:
    """Every entry of `index` lies in [0, upper)."""
    if index.numel() and bool(((index < 0) | (index >= upper)).any()):
        raise ValueError(f"{name}: an index is out of range")


def tensor(name: str, value: Tensor, *, dims: int, device: torch.device | None) -> None:
    """A dense tensor with `dims` dimensions on `device`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    if value.dim() != dims:
        raise ValueError(f"{name}: expected {dims} dimension(s), got shape {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: is on {value.device}, the first argument on {device}")


def dims(name: str, value: Tensor) -> int:
    """Number of dimensions of what must be a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    return value.dim()


def floating(name: str, value: Tensor, *, dims: int, device: torch.device | None = None) -> None:
    """A tensor of bfloat16, float16, float32 or float64."""
    tensor(name, value, dims=dims, device=device)
    if value.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"{name}: expected a floating dtype, got {value.dtype}")


def integer(name: str, value: Tensor, *, dims: int, device: torch.device | None = None) -> None:
    """A tensor of int64."""
    tensor(name, value, dims=dims, device=device)
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {value.dtype}")


def lengths(name: str, value: Tensor, *, device: torch.device) -> None:
    """A one-dimensional int64 tensor on the tokens' device; its values are checked by `segment_sizes`."""
    integer(name, value, dims=1, device=device)


def boolean(name: str, value: Tensor, *, shape: Sequence[int], device: torch.device) -> None:
    """A bool tensor of exactly this shape."""
    tensor(name, value, dims=len(shape), device=device)
    if value.dtype != torch.bool:
        raise TypeError(f"{name}: expected bool, got {value.dtype}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")


def size(name: str, value: Tensor, dim: int, expected: int) -> None:
    """Dimension `dim` has exactly `expected` entries."""
    if value.shape[dim] != expected:
        raise ValueError(
            f"{name}: expected size {expected} in dimension {dim}, got shape {tuple(value.shape)}"
        )


def same_size(name: str, value: Tensor, dim: int, other_name: str, other: Tensor, other_dim: int) -> None:
    """Two dimensions of two tensors agree."""
    if value.shape[dim] != other.shape[other_dim]:
        raise ValueError(
            f"{name}: shape {tuple(value.shape)} does not fit {other_name} of shape {tuple(other.shape)}"
        )


def same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Two tensors share a dtype."""
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: is {value.dtype}, {other_name} is {other.dtype}")


def fraction(name: str, value: float, *, zero: bool = False) -> None:
    """A number in (0, 1], or in [0, 1] with `zero`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (0 <= value <= 1) or (value == 0 and not zero):
        raise ValueError(f"{name}: expected a number in {'[' if zero else '('}0, 1], got {value}")


def positive_int(name: str, value: int) -> None:
    """An integer >= 1 that compiled code can hold."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if not 1 <= value < 2**31:
        raise ValueError(f"{name}: expected 1 to 2^31 - 1, got {value}")


def momentum_pairs(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Targets are float32 and pair up with sources of the same shapes and devices."""
    for name, tensors in (("targets", targets), ("sources", sources)):
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(f"{name}: expected a list of tensors, got {type(tensors).__name__}")
        for index, value in enumerate(tensors):
            if not isinstance(value, Tensor) or value.layout is not torch.strided:
                raise TypeError(f"{name}: number {index} is no dense tensor")
    if len(targets) != len(sources):
        raise ValueError(f"sources: {len(sources)} tensors for {len(targets)} targets")
    for index, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if target.dtype != torch.float32:
            raise TypeError(f"targets: tensor {index} is {target.dtype}, expected float32 masters")
        if not source.is_floating_point():
            raise TypeError(f"sources: tensor {index} is {source.dtype}, expected a floating dtype")
        if target.shape != source.shape or target.device != source.device:
            raise ValueError(
                f"sources: tensor {index} has shape {tuple(source.shape)} on {source.device}, "
                f"its target {tuple(target.shape)} on {target.device}"
            )
