"""The compiled contrastive cross entropy against the reference in float64, on every instruction set."""

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import atomas_kernels as ak
from atomas_kernels.reference import contrastive as reference

native = pytest.importorskip("atomas_kernels.native", reason="the native module is not built")
machine = importlib.import_module("atomas_kernels.native.machine")
native_contrastive = importlib.import_module("atomas_kernels.native.contrastive")

ALPHA = 0.4


class Problem(NamedTuple):
    query: Tensor
    momentum_query: Tensor
    keys: Tensor
    positive: Tensor
    temperature: Tensor
    queue: Tensor | None = None
    ignore: Tensor | None = None
    alpha: float = ALPHA

    def run(self, operator: Callable[..., Tensor]) -> Tensor:
        return operator(*self[:5], alpha=self.alpha, queue=self.queue, ignore=self.ignore)


@pytest.fixture(params=machine._native.instruction_sets(), scope="module")
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    best = machine.instruction_set
    machine.instruction_set = request.param
    yield request.param
    machine.instruction_set = best


def _problem(b: int, keys: int, queue: int, width: int, *, share_ignored: float = 0.0) -> Problem:
    generator = torch.Generator().manual_seed(b + keys + queue + width)

    def features(count: int) -> Tensor:
        return F.normalize(torch.randn(count, width, generator=generator), dim=1)

    ignore = torch.rand(b, keys + queue, generator=generator) < share_ignored
    return Problem(
        features(b),
        features(b),
        features(keys),
        torch.randint(0, keys, (b,), generator=generator),
        torch.tensor([0.07]),
        features(queue) if queue else None,
        ignore if share_ignored else None,
    )


def _with_gradients(operator: Callable[..., Tensor], problem: Problem) -> list[Tensor]:
    """Loss and the gradients of query, keys and temperature."""
    leaves = [x.detach().clone().requires_grad_() for x in (problem.query, problem.keys, problem.temperature)]
    query, keys, temperature = leaves
    loss = problem._replace(query=query, keys=keys, temperature=temperature).run(operator)
    return [loss, *torch.autograd.grad(loss * 1.7, leaves)]


def _exact(problem: Problem) -> Problem:
    return Problem(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in problem))


def _assert_exact(problem: Problem, tolerance: float = 2e-6) -> None:
    got = _with_gradients(native.contrastive_cross_entropy, problem)
    expected = _with_gradients(reference.contrastive_cross_entropy, _exact(problem))
    for a, b in zip(got, expected, strict=True):
        # Where all keys are equal the gradient is zero, the difference of sums near one.
        scale = b.abs().max().item() if b.abs().max() > 1e-6 else 1.0
        torch.testing.assert_close(a.double(), b, atol=tolerance * scale, rtol=0)


# Around the tiles (48 keys, 8 to 32 columns), the blocks of 32 queries and the ranges of 192 keys.
@pytest.mark.parametrize("b", [1, 7, 8, 9, 31, 32, 33, 70])
@pytest.mark.parametrize(("keys", "queue"), [(1, 0), (47, 1), (48, 48), (49, 97), (70, 315), (8, 500)])
def test_is_the_reference_at_the_edges(instruction_set: str, b: int, keys: int, queue: int) -> None:
    _assert_exact(_problem(b, keys, queue, 40, share_ignored=0.3 * (b % 2)))


# Rows of 64 and 768 numbers are read where they are, those of 1,024 would share their places in the cache.
@pytest.mark.parametrize("width", [1, 2, 8, 15, 16, 17, 24, 31, 33, 64, 100, 768, 1024])
def test_is_the_reference_for_any_width(instruction_set: str, width: int) -> None:
    _assert_exact(_problem(10, 12, 300, width))


@pytest.mark.parametrize("stride", [65, 80, 1024])
def test_rows_apart_give_the_same_bits(instruction_set: str, stride: int) -> None:
    problem = _problem(33, 50, 300, 64)
    assert problem.queue is not None
    apart = torch.full((300, stride), math.nan)
    apart[:, :64] = problem.queue
    got = _with_gradients(native.contrastive_cross_entropy, problem._replace(queue=apart[:, :64]))
    expected = _with_gradients(native.contrastive_cross_entropy, problem)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_more_logits_than_are_kept_at_a_time(instruction_set: str) -> None:
    _assert_exact(_problem(40, 80, 70_000, 3), 1e-5)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_is_the_reference_for_hard_and_soft_targets(instruction_set: str, alpha: float) -> None:
    _assert_exact(_problem(10, 30, 200, 32)._replace(alpha=alpha))


@pytest.mark.parametrize("queue_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_queries_and_queue_of_any_dtype(
    instruction_set: str, dtype: torch.dtype, queue_dtype: torch.dtype
) -> None:
    problem = _problem(9, 20, 250, 48)
    assert problem.queue is not None
    problem = Problem(*(x.to(dtype) for x in problem[:3]), *problem[3:5], problem.queue.to(queue_dtype))
    got = _with_gradients(native.contrastive_cross_entropy, problem)
    assert [x.dtype for x in got] == [torch.float32, dtype, dtype, torch.float32]
    # Only the gradients are rounded to the dtype; the sums are those of float32.
    _assert_exact(problem, 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(
        got[0].double(), _exact(problem).run(reference.contrastive_cross_entropy), atol=0, rtol=1e-6
    )


def test_half_precision_is_widened_exactly(instruction_set: str) -> None:
    # Every value of float16 but infinities and NaN, as a key with one large column; x = key, one query.
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    values = values[values.isfinite()]
    logits = values.double() / 256
    one = torch.ones(1, 1)
    problem = Problem(
        one / 256, one, torch.zeros(1, 1), torch.tensor([0]), torch.ones(1), values[:, None], alpha=0.0
    )
    loss = problem.run(native.contrastive_cross_entropy)
    expected = torch.cat([torch.zeros(1).double(), logits]).logsumexp(0)
    torch.testing.assert_close(loss.double(), expected, atol=0, rtol=1e-6)


def test_the_own_key_is_never_ignored(instruction_set: str) -> None:
    problem = _problem(9, 12, 300, 16)
    problem = problem._replace(ignore=torch.ones(9, 312, dtype=torch.bool))
    loss, *gradients = _with_gradients(native.contrastive_cross_entropy, problem)
    assert loss.item() == 0
    assert all(x.abs().max() < 1e-5 for x in gradients)


def test_ignored_is_left_out(instruction_set: str) -> None:
    problem = _problem(5, 6, 100, 16)
    assert problem.queue is not None
    ignore = torch.zeros(5, 106, dtype=torch.bool)
    ignore[:, 40:] = True
    got = _with_gradients(native.contrastive_cross_entropy, problem._replace(ignore=ignore))
    expected = _with_gradients(
        native.contrastive_cross_entropy, problem._replace(queue=problem.queue[:34].clone())
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_equal_keys_share_the_softmax(instruction_set: str) -> None:
    problem = _problem(4, 4, 60, 8)
    keys = problem.keys[:1]
    # The gradient of the temperature is the difference of two sums near 200.
    _assert_exact(problem._replace(keys=keys.repeat(4, 1), queue=keys.repeat(60, 1)), 2e-5)


def test_large_logits_do_not_overflow(instruction_set: str) -> None:
    problem = _problem(6, 9, 400, 32)
    _assert_exact(
        problem._replace(query=1e4 * problem.query, momentum_query=1e4 * problem.momentum_query), 1e-5
    )


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["query", "momentum_query", "keys", "queue"])
def test_what_is_not_finite_makes_the_loss_nan(instruction_set: str, name: str, poison: float) -> None:
    problem = _problem(9, 12, 300, 16)
    getattr(problem, name)[1, 0] = poison
    assert problem.run(native.contrastive_cross_entropy).isnan()
    assert problem.run(reference.contrastive_cross_entropy).isnan()
    _with_gradients(native.contrastive_cross_entropy, problem)


def test_an_empty_batch_costs_nothing(instruction_set: str) -> None:
    problem = _problem(0, 5, 30, 8)
    loss, *gradients = _with_gradients(native.contrastive_cross_entropy, problem)
    assert loss.item() == 0
    assert not any(x.any() for x in gradients)


@pytest.mark.parametrize("column", [-1, 5])
def test_an_own_key_out_of_range_is_refused(column: int) -> None:
    problem = _problem(2, 5, 30, 8)
    problem.positive[1] = column
    with pytest.raises(ValueError, match=r"^positive: "):
        problem.run(native.contrastive_cross_entropy)


def test_bitwise_equal_for_every_number_of_threads() -> None:
    problem = _problem(70, 80, 3000, 48, share_ignored=0.1)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(_with_gradients(native.contrastive_cross_entropy, problem))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_strided_tensors_are_taken_as_they_are() -> None:
    problem = _problem(9, 12, 300, 16, share_ignored=0.2)
    expected = _with_gradients(native.contrastive_cross_entropy, problem)

    def every_other(x: Any) -> Any:
        return torch.stack([x, x], dim=-1)[..., 0] if isinstance(x, Tensor) and x.dim() == 2 else x

    assert problem.queue is not None
    wide, tall = problem.queue.repeat(1, 3), problem.queue.repeat_interleave(2, dim=0)
    for queue in (wide[:, 16:32], tall[::2], problem.queue.T.contiguous().T):
        got = _with_gradients(native.contrastive_cross_entropy, problem._replace(queue=queue))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    got = _with_gradients(native.contrastive_cross_entropy, Problem(*map(every_other, problem)))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


class _LargestOutput(TorchDispatchMode):
    """Numbers in the largest tensor that an operator returns."""

    numbers = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for x in output if isinstance(output, (tuple, list)) else (output,):
            self.numbers = max(self.numbers, x.numel() if isinstance(x, Tensor) else 0)
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_queue_is_read_in_place(dtype: torch.dtype) -> None:
    problem = _problem(8, 8, 2000, 32)
    assert problem.queue is not None
    problem = problem._replace(queue=problem.queue.to(dtype))
    with _LargestOutput() as largest:
        _with_gradients(native.contrastive_cross_entropy, problem)
    # Neither a copy of the queue nor a matrix of logits.
    assert largest.numbers == 8 * 32
    with _LargestOutput() as largest:
        _with_gradients(reference.contrastive_cross_entropy, problem)
    assert largest.numbers >= 2008 * 32


def test_operators_are_well_formed_for_torch() -> None:
    problem = _problem(5, 6, 20, 8, share_ignored=0.2)
    leaves = [x.requires_grad_() for x in (problem.query, problem.keys, problem.temperature)]
    query, keys, temperature = leaves
    arguments = (query, problem.momentum_query, keys, problem.positive, temperature)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    options = (problem.queue, problem.ignore, ALPHA, True)
    torch.library.opcheck(native_contrastive._contrastive, (*arguments, *options), test_utils=utilities)


def test_stays_whole_under_torch_compile() -> None:
    problem = _problem(5, 6, 20, 8, share_ignored=0.2)
    leaves = [x.requires_grad_() for x in (problem.query, problem.keys, problem.temperature)]

    def step(query: Tensor, keys: Tensor, temperature: Tensor) -> Tensor:
        return problem._replace(query=query, keys=keys, temperature=temperature).run(
            ak.contrastive_cross_entropy
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(step(*leaves), leaves)
    got = torch.autograd.grad(compiled(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
