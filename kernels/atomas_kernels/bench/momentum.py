"""Providers of the momentum update, over the parameters of a T5."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import atomas_kernels
from atomas_kernels.bench.operators import Case, Operator, Prepared, Provider

_MOMENTUM = 0.995


class _Problem(NamedTuple):
    targets: list[Tensor]
    sources: list[Tensor]


def _sizes(parameters: int) -> list[tuple[int, int]]:
    """Matrices like those of a T5: an embedding with a fifth of the parameters, and layers of 512 columns."""
    embedding = max(1, parameters // 5 // 512)
    rest = max(1, parameters // 512 - embedding)
    return [(embedding, 512), *((min(512, rest - start), 512) for start in range(0, rest, 512))]


def _problem(case: Case) -> _Problem:
    generator = case.generator()
    sizes = _sizes(case.shape["parameters"])
    targets = [torch.randn(size, generator=generator) for size in sizes]
    sources = [case.values(torch.randn(size, generator=generator)) for size in sizes]
    return _Problem([x.double() if case.exact else x.to(case.device) for x in targets], sources)


def _exact(case: Case, semantics: str) -> Prepared:
    problem = _problem(case)
    pairs = list(zip(*problem, strict=True))
    return Prepared(lambda: [_MOMENTUM * target + (1 - _MOMENTUM) * source for target, source in pairs], [])


def _in_place(update: Callable[[list[Tensor], list[Tensor]], None]) -> Callable[[Case], Prepared]:
    def build(case: Case) -> Prepared:
        problem = _problem(case)

        def forward() -> list[Tensor]:
            update(*problem)
            return problem.targets

        return Prepared(forward, [])

    return build


def _published(targets: list[Tensor], sources: list[Tensor]) -> None:
    """The published loop, which binds `data` to a new tensor."""
    for target, source in zip(targets, sources, strict=True):
        target.data = target.data * _MOMENTUM + source.data * (1.0 - _MOMENTUM)


def _lerp(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.lerp_(source.to(target.dtype), 1 - _MOMENTUM)


def _foreach(targets: list[Tensor], sources: list[Tensor]) -> None:
    torch._foreach_mul_(targets, _MOMENTUM)
    torch._foreach_add_(targets, sources, alpha=1 - _MOMENTUM)


def _averaged_model(case: Case) -> Prepared:
    problem = _problem(case)
    slow, fast = (nn.ParameterList(nn.Parameter(x, requires_grad=False) for x in part) for part in problem)
    averaged = AveragedModel(slow, multi_avg_fn=get_ema_multi_avg_fn(_MOMENTUM))
    averaged.n_averaged.fill_(1)  # the first update copies

    def forward() -> list[Tensor]:
        averaged.update_parameters(fast)
        return list(averaged.module.parameters())

    return Prepared(forward, [])


def _ours(targets: list[Tensor], sources: list[Tensor]) -> None:
    atomas_kernels.momentum_update(targets, sources, _MOMENTUM)


OPERATOR = Operator(
    names=("momentum_update",),
    shapes={
        "smoke": [{"parameters": 100_000}],
        "paper": [{"parameters": 77_000_000}],
        "scale": [{"parameters": 248_000_000}],
    },
    providers={
        "eager_padded": Provider(build=_in_place(_published)),
        "torch-lerp": Provider(build=_in_place(_lerp)),
        "torch-foreach": Provider(build=_in_place(_foreach)),
        "torch-averaged-model": Provider(build=_averaged_model),
        "reference": Provider(build=_in_place(_ours), backend="reference"),
        "native": Provider(build=_in_place(_ours), backend="native"),
        "triton": Provider(build=_in_place(_ours), backend="triton"),
    },
    exact=_exact,
    differentiable=False,
    ragged=False,
)
