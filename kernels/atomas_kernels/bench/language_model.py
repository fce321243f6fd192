"""Providers of the cross entropy over a large vocabulary, of which some rows carry the label that is ignored.

Tokens [tokens, width], of which `valid` count, with the gradient of tokens and output embedding. Only `full`
compares alike: some providers compute their gradients in the forward pass.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import atomas_kernels
from atomas_kernels.bench.operators import Case, Operator, Prepared, Provider, compiled, grid
from atomas_kernels.reference.language_model import lm_cross_entropy as reference

_IGNORE = -100


class _Problem(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor


def _problem(case: Case) -> _Problem:
    generator = case.generator()
    tokens, width, vocabulary = (case.shape[name] for name in ("tokens", "width", "vocabulary"))
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * width**-0.5
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    ignored = torch.randperm(tokens, generator=generator)[case.shape["valid"] :]
    return _Problem(
        case.leaf(hidden), case.leaf(weight), labels.index_fill(0, ignored, _IGNORE).to(case.device)
    )


def _exact(case: Case, semantics: str) -> Prepared:
    problem = _problem(case)
    return Prepared(lambda: reference(*problem, ignore_index=_IGNORE), list(problem[:2]))


def _provider(operator: Callable[..., Tensor]) -> Callable[[Case], Prepared]:
    def build(case: Case) -> Prepared:
        problem = _problem(case)
        return Prepared(lambda: operator(*problem), list(problem[:2]))

    return build


def eager_padded(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The published form: logits of all rows."""
    return F.cross_entropy((hidden @ weight.T).float(), labels, ignore_index=_IGNORE)


def eager_masked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Logits of the rows that count."""
    valid = (labels != _IGNORE).nonzero().squeeze(1)
    return F.cross_entropy((hidden[valid] @ weight.T).float(), labels[valid])


def _torch_chunked(hidden: Tensor, weight: Tensor, labels: Tensor, rows: int | None = None) -> Tensor:
    """PyTorch's own, on all rows, in chunks of its choice or of up to `rows`."""
    options: Any = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    loss: Tensor = F.linear_cross_entropy(hidden, weight, labels, ignore_index=_IGNORE, options=options)
    return loss


def _torch_chunked_masked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """PyTorch's own at its best: on the rows that count, in chunks of up to 512."""
    valid = (labels != _IGNORE).nonzero().squeeze(1)
    return _torch_chunked(hidden[valid], weight, labels[valid], rows=512)


def _torch(operator: Callable[..., Tensor]) -> Callable[[Case], Prepared]:
    def build(case: Case) -> Prepared:
        if not hasattr(F, "linear_cross_entropy"):
            raise ImportError("torch is older than linear_cross_entropy")
        return _provider(operator)(case)

    return build


def _liger(case: Case) -> Prepared:
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(
        ignore_index=_IGNORE
    )
    return _provider(lambda hidden, weight, labels: loss(weight, hidden, labels))(case)


def _flops(case: Case) -> tuple[float, float]:
    product = 2.0 * case.shape["valid"] * case.shape["vocabulary"] * case.shape["width"]
    return product, 2 * product


OPERATOR = Operator(
    names=("lm_cross_entropy",),
    shapes={
        "smoke": grid(tokens=[64], valid=[24], vocabulary=[500], width=[32]),
        "paper": grid(tokens=[1024], valid=[128, 1024], vocabulary=[32128], width=[256, 768]),
        "scale": grid(tokens=[4096, 16384], valid=[4096], vocabulary=[32128], width=[768]),
    },
    providers={
        "eager_padded": Provider(build=_provider(eager_padded)),
        "eager_masked": Provider(build=_provider(eager_masked)),
        "compile_masked": Provider(build=_provider(compiled(eager_masked)), compiled=True),
        "reference": Provider(build=_provider(atomas_kernels.lm_cross_entropy), backend="reference"),
        "torch-linear-cross-entropy": Provider(build=_torch(_torch_chunked), package="torch"),
        "torch-linear-cross-entropy-masked": Provider(build=_torch(_torch_chunked_masked), package="torch"),
        "liger-kernel": Provider(build=_liger, package="liger-kernel", device="cuda"),
    },
    exact=_exact,
    flops=_flops,
    ragged=False,
)
