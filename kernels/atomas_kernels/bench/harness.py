"""Timing, parity and provenance of one benchmark row."""

import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (3e-2, 0.3)}
"""Largest relative deviation (in norm) of result and gradient from float64. Similarities rounded to bfloat16
tie, and another token of nearly the same similarity then takes the gradient."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One ragged problem."""

    text_lengths: Tensor
    smiles_lengths: Tensor
    width: int
    dtype: torch.dtype
    seed: int
    exact: bool = False
    """Computed in float64, from values rounded to `dtype`: what the other results are judged by."""

    def leaf(self, values: Tensor) -> Tensor:
        """A float32 tensor as an input of this case."""
        rounded = values.to(self.dtype)
        return (rounded.double() if self.exact else rounded).requires_grad_()

    def full(self) -> "Case":
        """A small problem of equal lengths, where the published form means the same as the masked one."""
        return replace(self, text_lengths=torch.full((3,), 24), smiles_lengths=torch.full((3,), 16))


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One way to compute an operator."""

    build: Callable[[Case], tuple[Callable[[], Tensor], list[Tensor]]]
    """Prepares a case outside of the timing: returns the forward pass and the leaves of its gradient."""
    ragged: bool = True
    """Whether it means the masked semantics on ragged input; the published form does not."""


def measure(module: ModuleType, name: str, case: Case, *, repeats: int) -> dict[str, Any]:
    """Row of one provider: parity first, then the times of forward and forward + backward."""
    providers: Mapping[str, Provider] = module.PROVIDERS
    row: dict[str, Any] = {
        "provider": name,
        "semantics": "masked" if name in providers and providers[name].ragged else "published",
        "shape": {"batch": len(case.text_lengths), "width": case.width},
        "lengths": {"text": int(case.text_lengths.sum()), "smiles": int(case.smiles_lengths.sum())},
        "dtype": str(case.dtype).removeprefix("torch."),
    }
    if name not in providers:
        return row | {"status": "unavailable", "reason": "this operator has no such provider"}
    provider = providers[name]
    cases = [case, case.full()] if provider.ragged else [case.full()]
    try:
        deviations = [_deviation(module, provider, part) for part in cases]
        errors = [max(kind) for kind in zip(*deviations, strict=True)]
        if any(error > limit for error, limit in zip(errors, _TOLERANCE[case.dtype], strict=True)):
            raise AssertionError(f"{name}: result and gradient deviate from float64 by {errors}")
        forward, leaves = provider.build(case)
        times = {
            "fwd": _times(_forward_only(forward), repeats),
            "full": _times(_full(forward, leaves), repeats),
        }
    except (ImportError, MemoryError, RuntimeError) as failure:
        return row | {"status": "unavailable", "reason": str(failure).splitlines()[0]}
    return row | {"ms": times, "error": errors[0], "gradient_error": errors[1], "status": "ok"}


def _deviation(module: ModuleType, provider: Provider, case: Case) -> tuple[float, float]:
    """Relative deviation of the result, and the largest of the gradients'."""
    exact, exact_leaves = module.PROVIDERS["reference"].build(replace(case, exact=True))
    forward, leaves = provider.build(case)
    pairs = zip(_results(forward, leaves), _results(exact, exact_leaves), strict=True)
    first, *gradients = (((got.double() - wanted).norm() / wanted.norm()).item() for got, wanted in pairs)
    return first, max(gradients)


def _results(forward: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    output = forward()
    return [output.detach(), *torch.autograd.grad((output * _upstream(output)).sum(), leaves)]


def _upstream(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)


def _forward_only(forward: Callable[[], Tensor]) -> Callable[[], object]:
    return torch.no_grad()(forward)


def _full(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    upstream = _upstream(forward())
    return lambda: torch.autograd.grad(forward(), leaves, upstream)


def _times(run: Callable[[], object], repeats: int) -> dict[str, float]:
    """Milliseconds at the 20th, 50th and 80th percentile, after one warm-up."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    quantiles = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double())
    return {key: round(1e3 * q.item(), 3) for key, q in zip(("p20", "p50", "p80"), quantiles, strict=True)}


def environment() -> dict[str, Any]:
    """Machine, versions and commit that a report was made with."""
    from atomas_kernels.registry import active_backend

    return {
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 2),
            "backend": active_backend("token_interaction"),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0].partition(":")[2].strip() if names else platform.processor()


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
