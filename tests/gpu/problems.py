"""Inputs of every operator, and its results with gradients."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atomas_kernels import registry
from atomas_kernels.reference.clustering import cluster_counts

DEVICE = torch.device(os.environ.get("ATOMAS_GPU_TEST_DEVICE", "cuda"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Below, at and above the blocks of the kernels.
TEXTS = [33, 0, 1, 128, 2, 64, 129, 17]
MOLECULES = [16, 65, 0, 31, 3, 127, 1, 32]


def backends(op: str) -> list[str]:
    """The backends that implement an operator on the device under test, installed or not."""
    return [c.backend for c in registry._IMPLEMENTATIONS[op] if c.fits(DEVICE)]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Arguments of one call, on the CPU."""

    op: str
    rounded: Mapping[str, Tensor]
    """Float64; differentiable, and computed on in the dtype under test."""
    kept: Mapping[str, Tensor]
    """Float64; differentiable, float32 whatever the dtype under test, as temperatures are."""
    fixed: Mapping[str, Any]
    """Passed on as they are; floating tensors in the dtype under test."""

    def arguments(self, dtype: torch.dtype, *, exact: bool = False) -> dict[str, Any]:
        """Values rounded to `dtype`; computed on in float64 if `exact`."""

        def place(value: Any, rounding: torch.dtype) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.is_floating_point():
                value = value.to(rounding)
            return value.to(DEVICE, torch.float64 if exact and value.is_floating_point() else value.dtype)

        leaves = {name: place(value, dtype).requires_grad_() for name, value in self.rounded.items()}
        leaves |= {name: place(value, torch.float32).requires_grad_() for name, value in self.kept.items()}
        return leaves | {name: place(value, dtype) for name, value in self.fixed.items()}


@dataclass(frozen=True)
class Results:
    """Float64 copies of what came out."""

    output: Tensor
    gradients: dict[str, Tensor]


def evaluate(function: Callable[..., Tensor], arguments: dict[str, Any]) -> Results:
    output = function(**arguments)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad}
    gradients = torch.autograd.grad((output * upstream.to(output)).sum(), list(leaves.values()))
    return Results(output.detach().double(), {n: g.double() for n, g in zip(leaves, gradients, strict=True)})


def largest_error(got: Tensor, wanted: Tensor) -> float:
    """Largest |got - wanted| / largest |wanted|; infinite for what is not a number."""
    error = (got - wanted).abs().max() / wanted.abs().max()
    return error.nan_to_num(nan=torch.inf).item()


def norm_error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted|; infinite for what is not a number."""
    error = (got - wanted).norm() / wanted.norm()
    return error.nan_to_num(nan=torch.inf).item()


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _softmaxed(lengths: list[int], seed: int) -> Tensor:
    return torch.cat([part.softmax(dim=0) for part in _normal(sum(lengths), seed=seed).split(lengths)])


def segment_softmax(width: int) -> Problem:
    logits = 3 * _normal(sum(TEXTS))
    return Problem(
        op="segment_softmax", rounded={"logits": logits}, kept={}, fixed={"lengths": torch.tensor(TEXTS)}
    )


def cluster_merge(width: int) -> Problem:
    lengths = torch.tensor(TEXTS)
    counts = cluster_counts(lengths, 0.25)
    # Random members, so that some clusters are empty.
    highest = counts.repeat_interleave(lengths)
    assignment = (torch.rand(sum(TEXTS), generator=torch.Generator().manual_seed(0)) * highest).long()
    return Problem(
        op="cluster_merge",
        rounded={"tokens": _normal(sum(TEXTS), width), "weight": _normal(sum(TEXTS), seed=2).exp()},
        kept={},
        fixed={"assignment": assignment, "lengths": lengths, "cluster_lengths": counts},
    )


def token_interaction(width: int) -> Problem:
    return _interaction(_normal(sum(TEXTS), width), _normal(sum(MOLECULES), width, seed=2), TEXTS, MOLECULES)


def planted_interaction(width: int) -> Problem:
    """Every token has one match in every other sequence, far better than the rest: rounding moves no maximum."""
    codes, texts, molecules = 36, 5, 7
    book = F.normalize(_normal(codes, width), dim=1)
    orders = [
        torch.randperm(codes, generator=torch.Generator().manual_seed(i)) for i in range(texts + molecules)
    ]
    noise = F.normalize(_normal(codes * (texts + molecules), width, seed=1), dim=1)
    tokens = book[torch.cat(orders)] + 0.3 * noise
    text, smiles = tokens.split([codes * texts, codes * molecules])
    return _interaction(text, smiles, [codes] * texts, [codes] * molecules)


def _interaction(text: Tensor, smiles: Tensor, texts: list[int], molecules: list[int]) -> Problem:
    weights = {"text_weight": _softmaxed(texts, 3), "smiles_weight": _softmaxed(molecules, 4)}
    lengths = {"text_lengths": torch.tensor(texts), "smiles_lengths": torch.tensor(molecules)}
    rounded = {"text": text, "smiles": smiles, **weights}
    return Problem(op="token_interaction", rounded=rounded, kept={}, fixed=lengths)


def packed_attention(width: int) -> Problem:
    heads, size, reach = 2, 64, 40
    lengths = torch.tensor(TEXTS)
    tokens = {name: 0.3 * _normal(sum(TEXTS), heads, size, seed=i) for i, name in enumerate(("query", "key"))}
    tokens["value"] = _normal(sum(TEXTS), heads, size, seed=2)
    return Problem(
        op="packed_attention",
        rounded=tokens,
        kept={"distance_bias": _normal(heads, 2 * reach + 1, seed=3)},
        fixed={"query_lengths": lengths, "key_lengths": lengths, "causal": True},
    )


def info_nce(width: int) -> Problem:
    scores = 0.3 * _normal(130, 130)
    mask = _normal(130, 130, seed=2) > 1
    kept = {"scale": torch.full((1,), 14.0).double()}
    return Problem(op="info_nce", rounded={"scores": scores}, kept=kept, fixed={"negative_mask": mask})


def contrastive_cross_entropy(width: int) -> Problem:
    queries, queued = 33, 1000
    query, momentum, keys, queue = (
        F.normalize(_normal(n, width, seed=i), dim=1) for i, n in enumerate((queries, queries, 40, queued))
    )
    fixed = {"momentum_query": momentum, "positive": torch.arange(queries) + 3, "alpha": 0.4, "queue": queue}
    fixed["ignore"] = _normal(queries, 40 + queued, seed=5) > 2
    return Problem(
        op="contrastive_cross_entropy",
        rounded={"query": query + keys[3 : 3 + queries] / 2, "keys": keys},
        kept={"temperature": torch.full((1,), 0.07).double()},
        fixed=fixed,
    )


def lm_cross_entropy(width: int) -> Problem:
    rows, vocabulary = 190, 1500
    labels = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(0))
    labels[::3] = -100
    tensors = {"hidden": _normal(rows, width), "weight": _normal(vocabulary, width, seed=2) / width**0.5}
    return Problem(op="lm_cross_entropy", rounded=tensors, kept={}, fixed={"labels": labels})


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "segment_softmax": segment_softmax,
    "cluster_merge": cluster_merge,
    "token_interaction": token_interaction,
    "planted_interaction": planted_interaction,
    "packed_attention": packed_attention,
    "info_nce": info_nce,
    "contrastive_cross_entropy": contrastive_cross_entropy,
    "lm_cross_entropy": lm_cross_entropy,
}
