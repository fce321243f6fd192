"""What a Triton module can launch, said once: for the launch, and for the compile gate that has no GPU.

Every module of this package has `variants(architecture)`, which yields each kernel x configuration x dtype that
it launches on that compute capability (80, 90, 100), of each kernel the one that matters most first: that one is
compiled by every test run.
"""

from dataclasses import dataclass
from typing import Any

import torch

DTYPES = ("fp32", "bf16", "fp16")
"""Token types of every operator, in Triton's names."""

ARCHITECTURES = (80, 90, 100)
"""Compute capabilities that have a table of configurations."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kernel with its compile-time constants, as one launch compiles it."""

    name: str
    """Unique over all modules: `operator_kernel[what sets it apart]`, for example `dpc_knn_rank[fp32,64]`."""
    kernel: Any
    """The function under `triton.jit`."""
    signature: dict[str, str]
    """Type of every run-time parameter, in any order: `*fp32` (every pointer is 16-byte aligned), `i32`, or
    `i32:16` for an integer that is a multiple of 16 in the launches that matter, such as a row stride.
    """
    constants: dict[str, Any]
    """Value of every other parameter; None for an optional tensor that is absent."""
    options: dict[str, Any]
    """From `launch_options`."""
    tensor_cores: bool
    """Whether its products must run on tensor cores."""


def launch_options(num_warps: int, num_stages: int, *, maxnreg: int | None = None) -> dict[str, Any]:
    """Options of a launch and of its compilation alike.

    Contraction into fused multiply-add is asked for: Triton 3.10 no longer does it by itself, which would change
    results silently. `maxnreg` is for a kernel that ptxas would let spill a few bytes to fit one more program on a
    multiprocessor: 255 says that it may have all registers.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return options if maxnreg is None else options | {"maxnreg": maxnreg}


def architecture(device: torch.device) -> int:
    """The table to use on `device`. Consumer cards (8.6, 8.9, 12.x) have the instructions of 8.0; the interpreter
    on the CPU takes 80 too.
    """
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return {9: 90, 10: 100}.get(major, 80)
