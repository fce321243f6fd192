"""Safetensors files that are on the disk as they were meant before anyone is told that they are there."""

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a file, force it to the disk and compare what can be read of it, bit for bit.

    Raises:
        OSError: it cannot be written, or does not hold what was written.
    """
    try:
        save_file(dict(tensors), path, metadata)
        to_disk(path)
        with safe_open(path, "pt") as file:
            for name, tensor in tensors.items():
                if not torch.equal(_bytes(file.get_tensor(name)), _bytes(tensor)):
                    raise OSError(f"{path}: {name} reads otherwise than it was written")
    except SafetensorError as error:  # a full disk comes as one too
        raise OSError(f"{path}: {error}") from error


def to_disk(path: Path) -> None:
    """Force a file to the disk, and out of the page cache, so that who reads it next reads the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # only advice: a file system may not know it
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
