"""Contrastive cross entropy in the interpreter, on CPU tensors; run by test_triton.py with TRITON_INTERPRET=1.

Only float32 and float16: the interpreter's arithmetic on bfloat16 is wrong.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from atomas_kernels.reference import contrastive as reference
from atomas_kernels.triton import contrastive, contrastive_backward, contrastive_tiles, tuning

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")

Problem = tuple[list[Tensor], dict[str, Any]]


def _problem(
    rows: int,
    keys: int,
    queue: int | None,
    width: int = 24,
    *,
    alpha: float = 0.4,
    ignored: float = 0.0,
    dtype: torch.dtype = torch.float32,
    queue_dtype: torch.dtype | None = None,
) -> Problem:
    """Query, momentum query, keys, positive, temperature; options."""
    generator = torch.Generator().manual_seed(rows + keys)

    def features(count: int) -> Tensor:
        return normalize(torch.randn(count, width, generator=generator), dim=1).to(dtype)

    positive = torch.randint(keys, (rows,), generator=generator)
    inputs = [features(rows), features(rows), features(keys), positive, torch.tensor([0.07])]
    further = None if queue is None else features(queue).to(queue_dtype or dtype)
    columns = keys + (queue or 0)
    ignore = torch.rand(rows, columns, generator=generator) < ignored if ignored else None
    return inputs, {"alpha": alpha, "queue": further, "ignore": ignore}


def _with_gradients(problem: Problem) -> list[Tensor]:
    """Loss and gradients of query, keys and temperature."""
    inputs, options = problem
    inputs = [x.detach().clone().requires_grad_(place in (0, 2, 4)) for place, x in enumerate(inputs)]
    loss = contrastive.contrastive_cross_entropy(*inputs, **options)
    (loss * 1.7).backward()
    return [loss.detach(), *(inputs[place].grad for place in (0, 2, 4))]  # type: ignore[list-item]


def _expected(problem: Problem) -> list[Tensor]:
    inputs, options = problem
    inputs = [x.detach().double() if x.is_floating_point() else x for x in inputs]
    inputs = [x.requires_grad_(place in (0, 2, 4)) for place, x in enumerate(inputs)]
    queue = options["queue"]
    options = options | {"queue": None if queue is None else queue.to(problem[0][0].dtype).double()}
    loss = reference.contrastive_cross_entropy(*inputs, **options)
    (loss * 1.7).backward()
    return [loss.detach(), *(inputs[place].grad for place in (0, 2, 4))]  # type: ignore[list-item]


def _assert_is_the_reference(problem: Problem, tolerance: float = 3e-6) -> None:
    # Where terms cancel, their rounding is what is left: logits are up to 1 / temperature.
    heat = problem[0][4].item()
    terms = (1 / heat, 1 / heat, 1 / heat, 1 / heat**2)
    for got, expected, term in zip(_with_gradients(problem), _expected(problem), terms, strict=True):
        scale = max(expected.abs().max().item(), 0.1 * term)
        torch.testing.assert_close(got.double(), expected, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize(
    ("rows", "keys", "queue", "width"),
    [
        (1, 1, None, 8),
        (2, 3, 0, 33),  # an empty queue
        (3, 64, 65, 16),  # tiles of keys: one, and one more than one
        (65, 63, 1, 32),  # tiles of rows
        (5, 128, 129, 70),  # a width of more than one step
        (4, 40, 512, 16),
    ],
)
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_sizes_around_every_tile(rows: int, keys: int, queue: int | None, width: int, ignored: float) -> None:
    _assert_is_the_reference(_problem(rows, keys, queue, width, ignored=ignored))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_hard_and_soft_targets_alone(alpha: float) -> None:
    _assert_is_the_reference(_problem(6, 9, 20, alpha=alpha, ignored=0.5))


def test_half_precision() -> None:
    _assert_is_the_reference(_problem(20, 70, 30, ignored=0.2, dtype=torch.float16), 2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_queue_of_another_dtype(dtype: torch.dtype) -> None:
    other = torch.float16 if dtype == torch.float32 else torch.float32
    tolerance = 3e-6 if dtype == torch.float32 else 2e-3
    _assert_is_the_reference(_problem(5, 9, 70, dtype=dtype, queue_dtype=other), tolerance)


def test_several_tiles_in_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive_backward, "_PROGRAMS", 2)
    _assert_is_the_reference(_problem(66, 130, 200, 40, ignored=0.2))


def test_a_row_that_ignores_every_key_keeps_its_own() -> None:
    problem = _problem(4, 70, 140, ignored=0.3)
    problem[1]["ignore"][2] = True
    _assert_is_the_reference(problem)
    problem[1]["ignore"][:] = True
    loss, grad_query, *_ = _with_gradients(problem)
    assert abs(loss.item()) < 1e-6
    assert grad_query.abs().max() < 1e-6


def test_equal_keys_share_the_probability() -> None:
    problem = _problem(3, 8, 40)
    problem[0][2][:] = problem[0][2][0]
    problem[1]["queue"][:] = problem[0][2][0]
    _assert_is_the_reference(problem)


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_extreme_temperatures(temperature: float) -> None:
    problem = _problem(4, 20, 90, ignored=0.2)
    problem[0][4].fill_(temperature)
    _assert_is_the_reference(problem, 2e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["keys", "queue"])
def test_a_key_that_is_not_finite_is_seen_in_the_loss(where: str, poison: float) -> None:
    inputs, options = _problem(3, 20, 90)
    (inputs[2] if where == "keys" else options["queue"])[17, 1] = poison
    assert not contrastive.contrastive_cross_entropy(*inputs, **options).isfinite()


def test_two_runs_are_bitwise_equal() -> None:
    problem = _problem(66, 70, 140, ignored=0.2)
    for first, second in zip(_with_gradients(problem), _with_gradients(problem), strict=True):
        assert torch.equal(first, second)


def test_only_the_gradients_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, options = _problem(3, 5, 7)
    monkeypatch.setattr(contrastive_backward, "_key_gradient", None)
    inputs[0].requires_grad_()
    contrastive.contrastive_cross_entropy(*inputs, **options).backward()
    assert inputs[0].grad is not None
    assert inputs[4].grad is None


def test_inputs_that_are_not_contiguous() -> None:
    inputs, options = _problem(6, 16, 30, ignored=0.3)
    plain = contrastive.contrastive_cross_entropy(*inputs, **options)
    strided = [x.T.contiguous().T if x.dim() == 2 else x for x in inputs]
    options = options | {name: options[name].T.contiguous().T for name in ("queue", "ignore")}
    assert torch.equal(contrastive.contrastive_cross_entropy(*strided, **options), plain)


@pytest.mark.parametrize("columns", [(16, 32), (16, 33)])
def test_the_mask_is_copied_only_where_its_rows_are_not_whole_vectors(columns: tuple[int, int]) -> None:
    ignore = torch.zeros(4, 48, dtype=torch.bool)
    part = ignore[:, slice(*columns)]
    aligned = contrastive_tiles.aligned(part)
    assert (aligned.data_ptr() == part.data_ptr()) == (columns == (16, 32))
    assert aligned.stride(0) % 16 == 0
    assert torch.equal(aligned[:, : part.shape[1]].bool(), part)


def test_no_rows() -> None:
    inputs, options = _problem(1, 3, 2)
    query = inputs[0][:0].requires_grad_()
    rest = (inputs[1][:0], inputs[2], inputs[3][:0], inputs[4])
    loss = contrastive.contrastive_cross_entropy(query, *rest, **options)
    loss.backward()
    assert loss.item() == 0


def test_a_positive_out_of_range_never_reaches_a_kernel() -> None:
    inputs, options = _problem(3, 5, 7)
    inputs[3][1] = 5
    with pytest.raises(ValueError, match="positive"):
        contrastive.contrastive_cross_entropy(*inputs, **options)


@pytest.mark.parametrize("queue", [None, 7])
def test_operator_is_declared_to_torch(queue: int | None) -> None:
    (query, momentum, keys, positive, temperature), options = _problem(3, 5, queue, ignored=0.2)
    leaves = (query.requires_grad_(), momentum, keys.requires_grad_(), temperature.requires_grad_())
    arguments = (*leaves, positive, options["alpha"], options["queue"], options["ignore"])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(contrastive._forward, arguments, test_utils=checks)


def test_autotune_takes_the_fastest_and_times_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []

    def milliseconds(run: Any) -> float:
        timed.append(run())
        return -timed[-1]

    monkeypatch.setattr(tuning.triton.testing, "do_bench", milliseconds)
    assert tuning.choose("a key", [1, 3, 2], lambda c: c) == 1
    monkeypatch.setenv("ATOMAS_AUTOTUNE", "1")
    assert tuning.choose("a key", [1, 3, 2], lambda c: c) == 3
    assert tuning.choose("a key", [1, 3, 2], lambda c: c) == 3
    assert timed == [1, 3, 2]
