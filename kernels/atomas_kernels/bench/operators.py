"""What a benchmark is made of: cases, providers, operators."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atomas_kernels.bench.lengths import draw

_FEW = 8
"""Sequences that results are judged by: the reference is slow and its float64 large."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One ragged problem."""

    shape: Mapping[str, int]
    """Sizes by name. Known to all operators: `batch` pairs of `level` (0: tokens, 1: fragments, 2: molecules),
    `width` of a token."""
    text_lengths: Tensor
    smiles_lengths: Tensor
    dtype: torch.dtype
    device: torch.device
    seed: int
    exact: bool = False
    """Computed in float64, from values rounded to `dtype`: what the other results are judged by."""

    @classmethod
    def draw(cls, shape: Mapping[str, int], *, dtype: torch.dtype, device: torch.device, seed: int) -> "Case":
        """A case with lengths like those of ChEBI-20."""
        batch, level = shape.get("batch", 0), shape.get("level", 0)
        text, smiles = (draw(modality, batch, seed, level).to(device) for modality in ("text", "smiles"))
        return cls(
            shape=shape, text_lengths=text, smiles_lengths=smiles, dtype=dtype, device=device, seed=seed
        )

    def generator(self) -> torch.Generator:
        """Random numbers of this case, the same for every provider."""
        return torch.Generator().manual_seed(self.seed)

    def values(self, values: Tensor) -> Tensor:
        """A float32 tensor as an input of this case that needs no gradient."""
        rounded = values.to(self.dtype)
        return (rounded.double() if self.exact else rounded).to(self.device)

    def leaf(self, values: Tensor) -> Tensor:
        """A float32 tensor as an input of this case, with a gradient."""
        return self.values(values).requires_grad_()

    def few(self) -> "Case":
        """The first sequences of the case."""
        return self._with(self.text_lengths[:_FEW], self.smiles_lengths[:_FEW])

    def equal(self) -> "Case":
        """Equal lengths, where padding has nothing to do and the published form means the same as the masked."""
        text, smiles = self.text_lengths[:3], self.smiles_lengths[:3]
        return self._with(torch.full_like(text, 24), torch.full_like(smiles, 16))

    def _with(self, text_lengths: Tensor, smiles_lengths: Tensor) -> "Case":
        shape = {**self.shape, "batch": len(text_lengths)}
        return replace(self, shape=shape, text_lengths=text_lengths, smiles_lengths=smiles_lengths)


class Prepared(NamedTuple):
    """A provider's inputs, ready to be run again and again."""

    forward: Callable[[], Tensor | list[Tensor]]
    leaves: list[Tensor]
    """What the gradient is taken of; empty where there is none."""


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One way to compute an operator."""

    build: Callable[[Case], Prepared]
    """Prepares a case outside of the timing; raises where it cannot run."""
    semantics: str = "masked"
    """What it computes: `masked` is our definition; `published` counts padding in, and is the same for equal
    lengths; others are explained where an operator has them."""
    backend: str | None = None
    """Of our own implementations: the backend that the operators must run on."""
    package: str | None = None
    """Of a peer: the distribution that brings it."""
    device: str | None = None
    """The only device type that it runs on."""
    compiled: bool = False
    """Whether its first run compiles."""
    crashes: bool = False
    """Whether it is known to end the process: it is tried in a child first."""
    needs: Callable[[Case, str], float] | None = None
    """Bytes beyond the inputs by mode, where they grow with the square of the batch."""


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator with all its providers."""

    names: Sequence[str]
    """The public operators that our own providers call."""
    shapes: Mapping[str, Sequence[Mapping[str, int]]]
    """By suite: smoke, paper, scale."""
    providers: Mapping[str, Provider]
    exact: Callable[[Case, str], Prepared]
    """The oracle for a case that is `exact`, by semantics."""
    flops: Callable[[Case], tuple[float, float]] | None = None
    """Operations that the ragged problem needs, forward and backward; None where memory alone counts."""
    differentiable: bool = True
    has_maxima: bool = False
    """Whether rounding can decide which of two tokens takes a gradient: the hundredth of the gradient's rows that
    deviates most is then left out of the comparison."""
    ragged: bool = True
    """Whether the lengths of texts and SMILES matter."""


def grid(**sizes: Sequence[int]) -> list[dict[str, int]]:
    """All combinations of sizes: `batch=[8, 32], width=[768]` gives two shapes."""
    shapes: list[dict[str, int]] = [{}]
    for name, values in sizes.items():
        shapes = [{**shape, name: value} for shape in shapes for value in values]
    return shapes


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for the one shape that a case has."""
    run: Callable[..., Any] = torch.compile(function, dynamic=False)
    return run
