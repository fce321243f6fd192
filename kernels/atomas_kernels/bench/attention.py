"""Providers of the encoder's self-attention over a packed batch of texts, with the bias of the distance.

With the gradient of queries, keys, values and bias.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import atomas_kernels
from atomas_kernels.bench.lengths import published_length
from atomas_kernels.bench.operators import Case, Operator, Prepared, Provider, compiled, grid
from atomas_kernels.bench.padding import Padding

_HEAD_WIDTH, _REACH = 64, 128


class _Problem(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor


def _problem(case: Case) -> _Problem:
    generator = case.generator()
    heads, total = case.shape["heads"], int(case.text_lengths.sum())
    query, key, value = (torch.randn(total, heads, _HEAD_WIDTH, generator=generator) for _ in range(3))
    bias = torch.randn(heads, 2 * _REACH + 1, generator=generator)
    # Logits of variance 1: T5 does not scale them, its projections do.
    return _Problem(*map(case.leaf, (query / _HEAD_WIDTH**0.5, key, value, bias)))


def _ours(case: Case) -> Prepared:
    query, key, value, bias = problem = _problem(case)
    lengths = case.text_lengths.cpu()
    return Prepared(
        lambda: atomas_kernels.packed_attention(query, key, value, lengths, lengths, distance_bias=bias),
        list(problem),
    )


def _exact(case: Case, semantics: str) -> Prepared:
    """Sequence after sequence, by the definition."""
    problem = _problem(case)

    def one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weight = (torch.einsum("ihd,jhd->hij", query, key) + _bias(problem.bias, len(query))).softmax(dim=2)
        return torch.einsum("hij,jhd->ihd", weight, value)

    def forward() -> Tensor:
        parts = (x.split(case.text_lengths.tolist()) for x in problem[:3])
        return torch.cat([one(*each) for each in zip(*parts, strict=True)])

    return Prepared(forward, list(problem))


def _bias(bias: Tensor, length: int) -> Tensor:
    """[H, N, N] from [H, 2 R + 1]."""
    place = torch.arange(length, device=bias.device)
    return bias[:, (place - place[:, None]).clamp(-_REACH, _REACH) + _REACH]


def eager(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """T5's own: scores [B, H, N, N], the bias [1, H, N, N] added with the mask, softmax in float32."""
    scores = torch.einsum("bihd,bjhd->bhij", query, key)
    position = _bias(bias, mask.shape[1])[None].masked_fill(~mask[:, None, None], -torch.inf)
    weight = (scores + position).float().softmax(dim=3).to(value.dtype)
    return torch.einsum("bhij,bjhd->bihd", weight, value)


def sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """The same through scaled_dot_product_attention."""
    position = _bias(bias, mask.shape[1])[None].masked_fill(~mask[:, None, None], -torch.inf)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=position, scale=1.0).transpose(1, 2)


def _padded(operator: Callable[..., Tensor], *, published: bool = False) -> Callable[[Case], Prepared]:
    def build(case: Case) -> Prepared:
        problem = _problem(case)
        pad = Padding.of(case.text_lengths, length=published_length(0) if published else None)

        def forward() -> Tensor:
            query, key, value = (pad(x) for x in problem[:3])
            return operator(query, key, value, problem.bias, pad.mask).flatten(0, 1)[pad.index]

        return Prepared(forward, list(problem))

    return build


def _flops(case: Case) -> tuple[float, float]:
    """Two products of each sequence; the gradient is four, the weights are computed again in a fifth."""
    product = 2 * float(case.text_lengths.double().square().sum()) * case.shape["heads"] * _HEAD_WIDTH
    return 2 * product, 5 * product


OPERATOR = Operator(
    names=("packed_attention",),
    shapes={
        "smoke": grid(batch=[4], heads=[2]),
        "paper": grid(batch=[8, 32], heads=[12]),
        "scale": grid(batch=[64, 256], heads=[12]),
    },
    providers={
        "eager_padded": Provider(build=_padded(eager, published=True)),
        "eager_masked": Provider(build=_padded(eager)),
        "compile_masked": Provider(build=_padded(compiled(eager)), compiled=True),
        "torch-sdpa": Provider(build=_padded(sdpa)),
        "reference": Provider(build=_ours, backend="reference"),
        "native": Provider(build=_ours, backend="native"),
        "triton": Provider(build=_ours, backend="triton"),
    },
    exact=_exact,
    flops=_flops,
)
