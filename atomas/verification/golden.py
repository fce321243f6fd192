"""Reading a folder of golden numbers, and judging how far from them a result is."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from atomas.errors import AtomasError

Kind = Literal["integer", "value", "gradient", "loss"]

TOLERANCES: dict[Kind, float] = {"integer": 0.0, "value": 1e-4, "gradient": 1e-3, "loss": 1e-4}
MAGNITUDE_FLOOR = 1e-4
"""Smaller golden numbers are judged as if of this size: what is zero in theory holds rounding noise."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One tensor of ours against one golden tensor."""

    quantity: str
    """What the tensor belongs to; one line of the table"""
    tensor: str
    """Name of the golden tensor"""
    kind: Kind
    deviation: float
    """Largest deviation over the largest golden magnitude of the tensor; for integers, how many differ"""

    @property
    def tolerance(self) -> float:
        """Largest deviation that passes."""
        return TOLERANCES[self.kind]

    @property
    def passed(self) -> bool:
        """Whether it is within the tolerance; NaN is not."""
        return self.deviation <= self.tolerance


def compare(quantity: str, tensor: str, kind: Kind, ours: Tensor, golden: Tensor) -> Check:
    """Judge a result, integers exactly whatever `kind` says; AtomasError where the shapes differ."""
    if ours.shape != golden.shape:
        raise AtomasError(
            f"{tensor}: golden shape {list(golden.shape)}, but the inputs make {list(ours.shape)}"
        )
    if not golden.is_floating_point():
        kind, deviation = "integer", float((ours != golden).sum())
    elif golden.numel() == 0:
        deviation = 0.0
    else:
        ours, golden = ours.detach().double(), golden.double()
        deviation = float((ours - golden).abs().max() / golden.abs().max().clamp(min=MAGNITUDE_FLOOR))
        # A NaN would lose every comparison, and be hidden behind a smaller deviation.
        deviation = math.inf if math.isnan(deviation) else deviation
    return Check(quantity=quantity, tensor=tensor, kind=kind, deviation=deviation)


class GoldenFile:
    """The tensors of one safetensors file; whatever is missing is an AtomasError that names it."""

    def __init__(self, path: Path, *, dtype: torch.dtype) -> None:
        """Read all of it; floating tensors become `dtype`."""
        self.path = path
        self.dtype = dtype
        try:
            tensors = load_file(path)
            self._tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        except (OSError, SafetensorError) as error:
            raise AtomasError(f"{path} is not readable as safetensors: {error}") from None

    def __getitem__(self, name: str) -> Tensor:
        """One tensor."""
        if name not in self._tensors:
            raise AtomasError(f"{self.path} has no tensor {name!r}")
        return self._tensors[name]

    def under(self, prefix: str) -> Mapping[str, Tensor]:
        """All tensors whose names start with `prefix.`, without it."""
        return {
            n.removeprefix(f"{prefix}."): t for n, t in self._tensors.items() if n.startswith(f"{prefix}.")
        }

    def groups(self) -> list[str]:
        """First parts of the dotted names, in natural order."""
        names = {name.split(".")[0] for name in self._tensors if "." in name}
        return sorted(names, key=lambda name: (len(name), name))


def flat(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N, ...] sequences that are all of one length -> ragged [B * N, ...] and lengths [B]."""
    batch, length = tokens.shape[:2]
    return tokens.flatten(0, 1), torch.full((batch,), length, dtype=torch.int64)


def worst_per_quantity(checks: list[Check]) -> Iterator[tuple[Check, int]]:
    """Of every quantity its worst check, and how many it has."""
    for quantity in dict.fromkeys(check.quantity for check in checks):
        group = [check for check in checks if check.quantity == quantity]
        yield max(group, key=lambda check: (not check.passed, check.deviation)), len(group)
