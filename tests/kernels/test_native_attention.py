"""The compiled packed attention against the reference in float64, with and without dropout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import atomas_kernels as ak
from atomas_kernels.reference import attention as reference

native = pytest.importorskip("atomas_kernels.native.attention", reason="the compiled module was not built")
from atomas_kernels import _native  # noqa: E402
from atomas_kernels.native import machine  # noqa: E402

INSTRUCTION_SETS = [name for name in _native.instruction_sets() if not name.startswith("amx")]
HEADS, REACH = 3, 5
SIZES = st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=0, max_size=4)


def _problem(sizes: list[tuple[int, int]], width: int, seed: int = 0) -> list[Tensor]:
    """Query, key, value, their lengths, distance and key biases, in float64."""
    torch.manual_seed(seed)
    queries, keys = (torch.tensor([pair[side] for pair in sizes], dtype=torch.int64) for side in (0, 1))
    tokens = [torch.randn(int(n.sum()), HEADS, width, dtype=torch.float64) for n in (queries, keys, keys)]
    biases = torch.randn(HEADS, 2 * REACH + 1, dtype=torch.float64), torch.randn(int(keys.sum())).double()
    return [*tokens, queries, keys, *biases]


def _run(function: object, problem: list[Tensor], dtype: torch.dtype, **options: object) -> list[Tensor]:
    """The result, and the gradients of all that has one, under a fixed upstream gradient."""
    *tokens, queries, keys, distance, of_key = problem
    leaves = [x.to(dtype).requires_grad_() for x in (*tokens, distance, of_key)]
    found = function(*leaves[:3], queries, keys, distance_bias=leaves[3], key_bias=leaves[4], **options)  # type: ignore[operator]
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [found, *torch.autograd.grad(found, leaves, upstream.to(dtype), materialize_grads=True)]


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(sizes=SIZES, causal=st.booleans(), width=st.sampled_from([4, 16, 33, 64]), seed=st.integers(0, 99))
def test_it_is_the_reference(
    isa: str, sizes: list[tuple[int, int]], causal: bool, width: int, seed: int
) -> None:
    problem = _problem(sizes, width, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "instruction_set", isa)
        got = _run(native.packed_attention, problem, torch.float32, causal=causal, dropout=0.0)
    expected = _run(reference.packed_attention, problem, torch.float64, causal=causal, dropout=0.0)
    for a, b in zip(got, expected, strict=True):
        assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences(causal: bool) -> None:
    problem = _problem([(512, 512), (300, 700), (1, 513)], 32)
    got = _run(native.packed_attention, problem, torch.float32, causal=causal, dropout=0.0)
    expected = _run(reference.packed_attention, problem, torch.float64, causal=causal, dropout=0.0)
    for a, b in zip(got, expected, strict=True):
        assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    problem = [x.to(dtype) if x.is_floating_point() else x for x in _problem([(40, 50)], 16)]
    got = _run(native.packed_attention, problem, dtype, causal=False, dropout=0.0)
    assert all(x.dtype == dtype for x in got)
    exact = _run(native.packed_attention, problem, torch.float32, causal=False, dropout=0.0)
    assert_close(got[0], exact[0].to(dtype), rtol=0, atol=0)


def test_rows_need_not_be_neighbours() -> None:
    query, key, value, queries, keys, *_ = (
        x.float() if x.is_floating_point() else x for x in _problem([(9, 9)], 8)
    )
    both = torch.stack((key, value), dim=1)
    options = {"distance_bias": None, "key_bias": None, "causal": True, "dropout": 0.0}
    found = native.packed_attention(query, *both.unbind(1), queries, keys, **options)
    assert_close(found, native.packed_attention(query, key, value, queries, keys, **options), rtol=0, atol=0)


def _dropped_weights(problem: list[Tensor], dropout: float, causal: bool) -> list[Tensor]:
    """[H, n, m] of each sequence: values that are unit vectors make the weights visible."""
    query, key, _, queries, keys, *biases = problem
    width = int(keys.max())
    padded = [torch.nn.functional.pad(x, (0, width - x.shape[2])).float() for x in (query, key)]
    units = torch.cat([torch.eye(int(m), width) for m in keys])[:, None].expand(-1, HEADS, -1).contiguous()
    found = native.packed_attention(
        *padded,
        units,
        queries,
        keys,
        distance_bias=biases[0],
        key_bias=biases[1],
        causal=causal,
        dropout=dropout,
    )
    parts = zip(found.split(queries.tolist()), keys.tolist(), strict=True)
    return [part[:, :, :m].transpose(0, 1) for part, m in parts]


@pytest.mark.parametrize("causal", [False, True])
def test_dropout_and_its_gradient(causal: bool) -> None:
    problem, rate = _problem([(60, 33), (7, 60)], 16), 0.3
    torch.manual_seed(5)
    kept = [weights != 0 for weights in _dropped_weights(problem, rate, causal)]

    def with_those(
        query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, **rest: Tensor
    ) -> Tensor:
        rows = []
        sizes = queries.tolist(), keys.tolist()
        parts = zip(
            query.split(sizes[0]), key.split(sizes[1]), value.split(sizes[1]), rest["key_bias"].split(sizes[1]),
            kept, strict=True,
        )  # fmt: skip
        for q, k, v, of_key, mask in parts:
            distance = torch.arange(len(k)) - torch.arange(len(q))[:, None]
            logits = torch.einsum("qhd,khd->hqk", q, k) + of_key
            logits = logits + rest["distance_bias"][:, distance.clamp(-REACH, REACH) + REACH]
            if causal:
                logits = logits.masked_fill(distance > 0, -torch.inf)
            rows.append(torch.einsum("hqk,khd->qhd", logits.softmax(2) * mask / (1 - rate), v))
        return torch.cat(rows)

    torch.manual_seed(5)
    got = _run(native.packed_attention, problem, torch.float32, causal=causal, dropout=rate)
    expected = _run(with_those, problem, torch.float64)
    for a, b in zip(got, expected, strict=True):
        assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_weights_are_dropped_at_the_rate_and_independently() -> None:
    torch.manual_seed(0)
    rate, n = 0.25, 256
    dropped = _dropped_weights(_problem([(n, n), (n, n)], 8), rate, causal=False)
    masks = torch.stack([(weights == 0).double() - rate for weights in dropped])  # [2, H, n, n]
    bound = 5 * (1 / masks.numel()) ** 0.5
    spread = rate * (1 - rate)
    assert abs(float(masks.mean())) < bound * spread**0.5
    neighbours = [
        masks[..., 1:] * masks[..., :-1], masks[..., 1:, :] * masks[..., :-1, :],
        masks[:, 1:] * masks[:, :-1], masks[1:] * masks[:-1], masks[..., 32:] * masks[..., :-32],
    ]  # fmt: skip
    for product in neighbours:
        assert abs(float(product.mean())) < 5 * spread * (1 / product.numel()) ** 0.5


def test_everything_dropped_is_zero() -> None:
    problem = _problem([(5, 6)], 8)
    for found in _run(native.packed_attention, problem, torch.float32, causal=False, dropout=1.0):
        assert not found.any()


def test_the_generator_decides_what_is_dropped() -> None:
    problem = _problem([(20, 20)], 8)

    def run(seed: int, threads: int) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(seed)
            found = _run(native.packed_attention, problem, torch.float32, causal=False, dropout=0.5)
        finally:
            torch.set_num_threads(before)
        return torch.cat([x.flatten() for x in found])

    assert torch.equal(run(0, 1), run(0, 2))
    assert not torch.equal(run(0, 1), run(1, 1))


def test_a_sequence_does_not_depend_on_what_it_is_batched_with() -> None:
    both = [x.float() if x.is_floating_point() else x for x in _problem([(50, 61), (13, 29)], 32)]
    query, key, value, queries, keys, distance, of_key = both
    options = {"distance_bias": distance, "causal": False, "dropout": 0.0}
    whole = native.packed_attention(query, key, value, queries, keys, key_bias=of_key, **options)
    alone = native.packed_attention(
        query[50:], key[61:], value[61:], queries[1:], keys[1:], key_bias=of_key[61:], **options
    )
    assert torch.equal(whole[50:], alone)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_sequence(poison: float) -> None:
    problem = [x.float() if x.is_floating_point() else x for x in _problem([(9, 9), (8, 8)], 8)]
    problem[1][3, 0, 0] = poison
    found = _run(native.packed_attention, problem, torch.float32, causal=False, dropout=0.0)
    assert not found[0][:9].isfinite().all()
    assert found[0][9:].isfinite().all()
    assert found[1][9:].isfinite().all()


def test_keys_that_nothing_reads() -> None:
    query, key, value, queries, keys, *_ = (
        x.float() if x.is_floating_point() else x for x in _problem([(3, 4)], 8)
    )
    of_key = torch.full((4,), -torch.inf)
    found = native.packed_attention(
        query, key, value, queries, keys, distance_bias=None, key_bias=of_key, causal=False, dropout=0.0
    )
    assert not found.any()


def test_it_is_the_one_of_the_cpu() -> None:
    assert ak.active_backend("packed_attention") == "native"
    assert ak.active_backend("packed_attention", dtype=torch.float64) == "reference"
