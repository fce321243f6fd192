"""Which backend runs an operator: `ATOMAS_KERNELS` or `set_backend`, else the fastest one that can run.

`auto` takes the first of an operator's backends that supports the tensor's device and dtype and can be
imported; one that cannot be imported is passed over with a single log line. A backend chosen by name is used
for every operator that it implements on the tensor's device, and raises where it cannot run; the operators that
it does not implement there keep to the reference. `native` has implementations for the CPU and for CUDA.
"""

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "native", "triton")

_log = logging.getLogger("atomas_kernels")
_HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One operator in one backend."""

    backend: str
    target: str
    """`module:function`, imported on first use."""
    device: str | None = None
    """Device type that it runs on; None: any."""
    dtypes: tuple[torch.dtype, ...] | None = None
    """Token dtypes that it takes; None: any."""

    def fits(self, device: torch.device) -> bool:
        """Whether it is made for such a device."""
        return self.device in (None, device.type)

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run there, or None."""
        if not self.fits(device):
            return f"it runs on {self.device}, the tensors are on {device.type}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"it does not take {dtype}"
        return _import_error(self.target.partition(":")[0])


def _reference(module: str, name: str) -> Implementation:
    return Implementation(backend="reference", target=f"atomas_kernels.reference.{module}:{name}")


def _native(name: str) -> Implementation:
    target = f"atomas_kernels.native:{name}"
    return Implementation(backend="native", target=target, device="cpu", dtypes=_HALF_AND_SINGLE)


def _cuda(module: str, name: str) -> Implementation:
    target = f"atomas_kernels.cuda.{module}:{name}"
    return Implementation(backend="native", target=target, device="cuda", dtypes=_HALF_AND_SINGLE)


def _triton(module: str, name: str) -> Implementation:
    target = f"atomas_kernels.triton.{module}:{name}"
    return Implementation(backend="triton", target=target, device="cuda", dtypes=_HALF_AND_SINGLE)


# In the order in which `auto` prefers them. On CUDA that is Triton where there is a kernel: the reference keeps
# intermediates that grow with the product of all lengths, and adds in any order. What torch does as well (attention,
# the momentum update) stays with the reference there until a measurement on a GPU says otherwise.
_IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {
    "segment_softmax": (_reference("segments", "segment_softmax"),),
    "dpc_knn": (
        _native("dpc_knn"),
        _triton("clustering", "dpc_knn"),
        _cuda("clustering", "dpc_knn"),
        _reference("clustering", "dpc_knn"),
    ),
    "cluster_merge": (
        _native("cluster_merge"),
        _triton("merge", "cluster_merge"),
        _cuda("clustering", "cluster_merge"),
        _reference("clustering", "cluster_merge"),
    ),
    "token_interaction": (
        _native("token_interaction"),
        _triton("interaction", "token_interaction"),
        _reference("interaction", "token_interaction"),
    ),
    "packed_attention": (
        _native("packed_attention"),
        _reference("attention", "packed_attention"),
        Implementation(
            backend="triton",
            target="atomas_kernels.attention_flex:packed_attention",
            device="cuda",
            dtypes=_HALF_AND_SINGLE,
        ),
    ),
    "dropout": (_native("dropout"), _reference("dropout", "dropout")),
    "info_nce": (_reference("contrastive", "info_nce"),),
    "contrastive_cross_entropy": (
        _native("contrastive_cross_entropy"),
        _triton("contrastive", "contrastive_cross_entropy"),
        _reference("contrastive", "contrastive_cross_entropy"),
    ),
    "lm_cross_entropy": (_reference("language_model", "lm_cross_entropy"),),
    "momentum_update": (_reference("momentum", "momentum_update"), _cuda("momentum", "momentum_update")),
}


def set_backend(name: str) -> None:
    """Choose the backend of all operators in this process: one of `auto`, `reference`, `native`, `triton`.

    Raises ValueError for another name. It overrides the environment variable `ATOMAS_KERNELS`.
    """
    global _chosen
    _chosen = _checked(name, "backend")


def active_backend(op: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Name of the backend that runs operator `op` for tokens of this device and dtype.

    Raises ValueError for an unknown operator, RuntimeError if the chosen backend cannot run there.
    """
    return _select(op, torch.device(device), dtype).backend


def active_backends(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """`active_backend` of every operator, for logs and reports."""
    return {op: active_backend(op, device, dtype) for op in _IMPLEMENTATIONS}


def implementation(op: str, tokens: Tensor) -> Callable[..., Any]:
    """The function that runs operator `op` on tensors like `tokens`."""
    target = _load(op, tokens.device, tokens.dtype)
    return _loaded[target]


def _load(op: str, device: torch.device, dtype: torch.dtype) -> str:
    target = _select(op, device, dtype).target
    if target not in _loaded:
        module, _, name = target.partition(":")
        _loaded[target] = getattr(importlib.import_module(module), name)
    return target


# Under torch.compile the choice is made once, while tracing, and its name (not the function) becomes a
# constant. This is what torch.compiler.assume_constant_result does, which would import the whole compiler
# (seconds) to do it.
_load._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _select(op: str, device: torch.device, dtype: torch.dtype) -> Implementation:
    if op not in _IMPLEMENTATIONS:
        raise ValueError(f"op: no operator {op!r}; there are {', '.join(_IMPLEMENTATIONS)}")
    candidates = _IMPLEMENTATIONS[op]
    if _chosen == "auto":
        return next(c for c in candidates if c.obstacle(device, dtype) is None)
    named = [c for c in candidates if c.backend == _chosen]
    if any(c.backend == _chosen and c.fits(device) for group in _IMPLEMENTATIONS.values() for c in group):
        named = [c for c in named if c.fits(device)]
    candidate = named[0] if named else next(c for c in candidates if c.backend == "reference")
    obstacle = candidate.obstacle(device, dtype)
    if obstacle is not None:
        raise RuntimeError(f"{op}: the backend {_chosen!r} was chosen but cannot run: {obstacle}")
    return candidate


@cache
def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        _log.warning("%s is not available (%s); its operators run on another backend", module, error)
        return str(error)
    return None


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: no backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return name


_chosen = _checked(os.environ.get("ATOMAS_KERNELS", "auto"), "ATOMAS_KERNELS")
_loaded: dict[str, Callable[..., Any]] = {}
