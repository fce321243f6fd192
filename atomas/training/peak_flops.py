"""What a device can do at most: the denominator of MFU and HFU."""

import time
from dataclasses import dataclass

import torch

DENSE_BFLOAT16 = (
    (("GB200",), 2500e12),
    (("B200",), 2250e12),
    (("H200", "NVL"), 835e12),
    (("H200",), 989e12),
    (("GH200",), 989e12),
    (("H100", "PCIe"), 756e12),
    (("H100", "NVL"), 835e12),
    (("H100",), 989e12),
    (("A100",), 312e12),
)
"""Words of a device's name, and its dense bf16 tensor-core FLOP/s in NVIDIA's data sheets (half of what they give "with
sparsity"); the first row whose words all occur counts."""

_SIDES = (256, 512, 1024, 2048, 4096, 8192)
_REPEATS = 3
_SECONDS = 0.25
"""No longer product is begun after this time: some devices multiply bf16 a hundred times slower than others."""


@dataclass(frozen=True)
class PeakFlops:
    """FLOP/s of one device, and where the number is from."""

    per_second: float
    source: str


def peak_flops(device: torch.device, precision: str) -> PeakFlops:
    """The data sheet's dense bf16 rate of a known GPU, whatever the run's precision; else the rate of a matrix product.

    `precision` is `training.precision`. The product is timed here and now, for a fraction of a second, with the threads
    that this process has.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for words, peak in DENSE_BFLOAT16:
            if all(word in name for word in words):
                return PeakFlops(peak, f"data sheet, dense bf16 of {' '.join(words)}")
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(precision, torch.bfloat16)
    rate, side = _measured(device, dtype)
    return PeakFlops(rate, f"measured: {side} x {side} x {side} in {str(dtype).removeprefix('torch.')}")


def _measured(device: torch.device, dtype: torch.dtype) -> tuple[float, int]:
    """The best rate of square products, and their side."""
    begun = time.perf_counter()
    best = (0.0, 0)
    for side in _SIDES:
        one = torch.ones(side, side, device=device, dtype=dtype)
        result = torch.empty_like(one)
        for _ in range(_REPEATS):
            _wait(device)
            started = time.perf_counter()
            torch.mm(one, one, out=result)
            _wait(device)
            best = max(best, (2 * side**3 / (time.perf_counter() - started), side))
        if time.perf_counter() - begun > _SECONDS:
            break
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
