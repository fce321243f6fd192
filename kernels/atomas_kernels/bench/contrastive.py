"""Providers of the soft-target contrastive cross entropy against a batch of keys and a queue.

One direction, with the gradient of queries and temperature. `hard_labels`: without momentum targets.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import atomas_kernels
from atomas_kernels.bench.operators import Case, Operator, Prepared, Provider, compiled, grid
from atomas_kernels.reference.contrastive import contrastive_cross_entropy as reference

_ALPHA, _TEMPERATURE = 0.4, 0.07


class _Problem(NamedTuple):
    query: Tensor
    momentum_query: Tensor
    keys: Tensor
    queue: Tensor
    temperature: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.query, self.temperature]


def _problem(case: Case) -> _Problem:
    generator = case.generator()
    batch, width, queue = case.shape["batch"], case.shape["width"], case.shape["queue"]

    def features(count: int) -> Tensor:
        return F.normalize(torch.randn(count, width, generator=generator), dim=-1)

    query, momentum_query, keys, queued = (features(n) for n in (batch, batch, batch, queue))
    # A cosine of 0.24 between a query and its key: learned, and not so well that the loss is all rounding.
    query, momentum_query = (F.normalize(keys + 4 * x, dim=-1) for x in (query, momentum_query))
    temperature = torch.tensor([_TEMPERATURE], device=case.device, requires_grad=True)
    if case.exact:
        temperature = temperature.detach().double().requires_grad_()
    momentum_query, keys, queued = (case.values(x) for x in (momentum_query, keys, queued))
    return _Problem(case.leaf(query), momentum_query, keys, queued, temperature)


def _exact(case: Case, semantics: str) -> Prepared:
    problem = _problem(case)
    alpha = 0.0 if semantics == "hard_labels" else _ALPHA
    positive = torch.arange(len(problem.query), device=case.device)

    def forward() -> Tensor:
        query, momentum_query, keys, queue, temperature = problem
        return reference(
            query, momentum_query, keys, positive, temperature, alpha=alpha, queue=queue, ignore=None
        )

    return Prepared(forward, problem.leaves)


def _ours(case: Case) -> Prepared:
    problem = _problem(case)
    query, momentum_query, keys, queue, temperature = problem
    positive = torch.arange(len(query), device=case.device)

    def forward() -> Tensor:
        return atomas_kernels.contrastive_cross_entropy(
            query, momentum_query, keys, positive, temperature, alpha=_ALPHA, queue=queue
        )

    return Prepared(forward, problem.leaves)


def eager_padded(
    query: Tensor, momentum_query: Tensor, keys: Tensor, queue: Tensor, temperature: Tensor
) -> Tensor:
    """The published form: the queue [D, K] is copied behind the keys, logits and targets are written out."""
    all_keys = torch.cat([keys.T, queue.clone().detach()], dim=1)
    with torch.no_grad():
        hard = torch.zeros(len(query), all_keys.shape[1], device=query.device, dtype=query.dtype)
        hard.fill_diagonal_(1)
        momentum_logits = momentum_query @ all_keys / temperature
        targets = _ALPHA * F.softmax(momentum_logits, dim=1) + (1 - _ALPHA) * hard
    logits = query @ all_keys / temperature
    return -torch.sum(F.log_softmax(logits, dim=1) * targets, dim=1).mean()


def eager_masked(
    query: Tensor, momentum_query: Tensor, keys: Tensor, queue: Tensor, temperature: Tensor
) -> Tensor:
    """Plain PyTorch: the queue [K, D] is read in place."""
    logits = torch.cat([query @ keys.T, query @ queue.T], dim=1).float() / temperature
    with torch.no_grad():
        momentum_logits = torch.cat([momentum_query @ keys.T, momentum_query @ queue.T], dim=1)
        targets = _ALPHA * (momentum_logits.float() / temperature).softmax(dim=1)
        targets.diagonal().add_(1 - _ALPHA)
    return F.cross_entropy(logits, targets)


def _eager(operator: Callable[..., Tensor], *, transposed: bool = False) -> Callable[[Case], Prepared]:
    def build(case: Case) -> Prepared:
        problem = _problem(case)
        if transposed:
            problem = problem._replace(queue=problem.queue.T.contiguous())
        return Prepared(lambda: operator(*problem), problem.leaves)

    return build


def _inf_cl(case: Case) -> Prepared:
    loss = importlib.import_module("inf_cl").cal_inf_loss
    problem = _problem(case)
    keys = torch.cat([problem.keys, problem.queue])

    def forward() -> Tensor:
        result: Tensor = loss(problem.query / problem.temperature, keys)
        return result

    return Prepared(forward, problem.leaves)


def _flops(case: Case) -> tuple[float, float]:
    """Logits of student and teacher; the gradient is one product with the keys."""
    batch, width, queue = case.shape["batch"], case.shape["width"], case.shape["queue"]
    product = 2.0 * batch * (batch + queue) * width
    return 2 * product, product


OPERATOR = Operator(
    names=("contrastive_cross_entropy",),
    shapes={
        "smoke": grid(batch=[8], width=[64], queue=[500]),
        "paper": [
            *grid(batch=[8, 32], width=[768], queue=[13200]),
            *grid(batch=[32], width=[768], queue=[0, 65536]),
        ],
        "scale": grid(batch=[64, 256, 1024], width=[768], queue=[13200]),
    },
    providers={
        "eager_padded": Provider(build=_eager(eager_padded, transposed=True)),
        "eager_masked": Provider(build=_eager(eager_masked)),
        "compile_masked": Provider(build=_eager(compiled(eager_masked)), compiled=True),
        "reference": Provider(build=_ours, backend="reference"),
        "native": Provider(build=_ours, backend="native"),
        "triton": Provider(build=_ours, backend="triton"),
        "inf-cl": Provider(build=_inf_cl, semantics="hard_labels", package="inf-cl", device="cuda"),
    },
    exact=_exact,
    flops=_flops,
    ragged=False,
)
