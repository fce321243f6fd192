"""Packed T5 attention against a loop over sequences and heads, and against transformers' T5."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

import atomas_kernels as ak
from atomas_kernels import attention_flex
from atomas_kernels.reference import attention

HEADS, WIDTH, REACH = 2, 4, 3
SIZES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=0, max_size=5)


def _problem(query_sizes: list[int], key_sizes: list[int], seed: int = 0) -> list[Tensor]:
    """Query, key, value, their lengths and a table of biases, in float64."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(sum(n), HEADS, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
        for n in (query_sizes, key_sizes, key_sizes)
    )
    lengths = [torch.tensor(n, dtype=torch.int64) for n in (query_sizes, key_sizes)]
    bias = torch.randn(HEADS, 2 * REACH + 1, generator=generator, dtype=torch.float64).requires_grad_()
    return [query, key, value, *lengths, bias]


def _loop(arguments: list[Tensor], bias: Tensor | None, key_bias: Tensor, causal: bool) -> Tensor:
    """The definition, one query at a time."""
    query, key, value, query_lengths, key_lengths = arguments
    queries, keys, values, key_biases = (
        x.split(lengths.tolist())
        for x, lengths in (
            (query, query_lengths), (key, key_lengths), (value, key_lengths), (key_bias, key_lengths)
        )
    )  # fmt: skip
    rows = []
    for q, k, v, b in zip(queries, keys, values, key_biases, strict=True):
        for place in range(len(q)):
            logits = torch.einsum("hd,jhd->hj", q[place], k) + b
            distance = torch.arange(len(k)) - place
            if bias is not None:
                logits = logits + bias[:, distance.clamp(-REACH, REACH) + REACH]
            if causal:
                logits = logits.masked_fill(distance > 0, -math.inf)
            rows.append(torch.einsum("hj,jhd->hd", logits.softmax(dim=1), v))
    return torch.stack(rows) if rows else query


@pytest.mark.parametrize("waste", [0.0, 0.05, 0.5])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(sizes=SIZES, causal=st.booleans(), biased=st.booleans(), seed=st.integers(0, 99))
def test_it_is_its_definition(
    waste: float, sizes: list[tuple[int, int]], causal: bool, biased: bool, seed: int
) -> None:
    *arguments, table = _problem([n for n, _ in sizes], [m for _, m in sizes], seed)
    key_bias = torch.randn(len(arguments[1]), dtype=torch.float64).requires_grad_()
    bias, of_key = (table, key_bias) if biased else (None, None)
    leaves = [*arguments[:3], *([table, key_bias] if biased else [])]
    with pytest.MonkeyPatch.context() as patch:
        # How accelerators group the sequences, with padding, holds on the CPU as well.
        patch.setattr(attention, "_waste", lambda device: waste)
        got = ak.packed_attention(*arguments, distance_bias=bias, key_bias=of_key, causal=causal)
    expected = _loop(arguments, bias, key_bias if biased else torch.zeros_like(key_bias), causal)
    assert_close(got, expected)
    if not any(n and m for n, m in sizes):
        return
    upstream = torch.randn_like(expected)
    gradients = (torch.autograd.grad(x, leaves, upstream) for x in (got, expected))
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b)


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 600)), max_size=200),
    waste=st.sampled_from([0.0, 0.05, 0.3]),
)
def test_groups_leave_little_empty(sizes: list[tuple[int, int]], waste: float) -> None:
    queries, keys = (tuple(part) for part in zip(*sizes, strict=True)) if sizes else ((), ())
    groups = attention._groups(queries, keys, waste)
    assert sorted(row for *_, rows in groups for row in rows) == [
        i for i, both in enumerate(sizes) if all(both)
    ]
    for most, of in ((0, queries), (1, keys)):
        slots = sum(group[most] * len(group[2]) for group in groups)
        tokens = sum(of[row] for *_, rows in groups for row in rows)
        assert all(of[row] <= group[most] for group in groups for row in group[2])
        assert slots - tokens <= waste * slots * 1.0001


@pytest.mark.parametrize("decoder", [False, True])
def test_it_is_the_attention_of_transformers(decoder: bool) -> None:
    config = T5Config(
        d_model=12, d_kv=WIDTH, num_heads=HEADS, is_decoder=decoder, relative_attention_max_distance=40
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    layer = (
        T5Attention(config, has_relative_attention_bias=True, layer_idx=0, is_causal=decoder).double().eval()
    )
    sizes = [70, 3, 1]
    tokens = torch.randn(sum(sizes), 12, dtype=torch.float64)

    buckets = ak.distance_buckets(max_distance=40, bidirectional=not decoder)
    query, key, value = (x(tokens).unflatten(1, (HEADS, WIDTH)) for x in (layer.q, layer.k, layer.v))
    lengths = torch.tensor(sizes)
    bias = layer.relative_attention_bias(buckets).T
    attended = ak.packed_attention(query, key, value, lengths, lengths, distance_bias=bias, causal=decoder)
    got = layer.o(attended.flatten(1))
    for mine, part in zip(got.split(sizes), tokens.split(sizes), strict=True):
        mask = torch.full((len(part), len(part)), -math.inf).triu(1).double() if decoder else None
        assert_close(mine, layer(part[None], mask=mask)[0][0])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 100), (8, 20), (64, 512)])
def test_buckets_are_those_of_transformers(bidirectional: bool, buckets: int, max_distance: int) -> None:
    far = 2 * max_distance
    expected = T5Attention._relative_position_bucket(
        torch.arange(-far, far + 1), bidirectional, buckets, max_distance
    )
    sizes = {"buckets": buckets, "max_distance": max_distance}
    got = ak.distance_buckets(**sizes, bidirectional=bidirectional)
    reached = torch.arange(-far, far + 1).clamp(-max_distance, max_distance) + max_distance
    assert torch.equal(got[reached], expected)


@pytest.mark.parametrize(("buckets", "max_distance"), [(3, 128), (32, 8), (0, 5), (32, 0)])
def test_too_few_buckets_or_too_near(buckets: int, max_distance: int) -> None:
    with pytest.raises(ValueError, match=r"^(buckets|max_distance): "):
        ak.distance_buckets(buckets=buckets, max_distance=max_distance, bidirectional=True)


def test_queries_without_keys_are_zero_and_train() -> None:
    query, key, value, query_lengths, key_lengths, _ = _problem([3, 2], [0, 4])
    attended = ak.packed_attention(query, key, value, query_lengths, key_lengths, causal=True)
    assert not attended[:3].any()
    assert bool(attended[3:].all())
    biases = torch.randn(2, 5, requires_grad=True), torch.randn(0, requires_grad=True)
    empty = ak.packed_attention(
        query, key[:0], value[:0], query_lengths, torch.zeros_like(key_lengths),
        distance_bias=biases[0], key_bias=biases[1],
    )  # fmt: skip
    assert not empty.any()
    empty.sum().backward()
    for tensor in (query, *biases):
        assert tensor.grad is not None  # where weights are sharded, every rank must ask for the same ones
        assert not tensor.grad.any()


def test_dropout_drops_weights_and_keeps_their_mean() -> None:
    query, key, value, query_lengths, key_lengths, bias = _problem([4], [6])
    expected = ak.packed_attention(query, key, value, query_lengths, key_lengths, distance_bias=bias)
    torch.manual_seed(0)
    copies = 2000
    arguments = [x.repeat(copies, 1, 1) for x in (query, key, value)]
    lengths = query_lengths.repeat(copies), key_lengths.repeat(copies)
    samples = ak.packed_attention(*arguments, *lengths, distance_bias=bias, dropout=0.25)
    samples = samples.unflatten(0, (copies, 4))
    assert_close(samples.mean(dim=0), expected, atol=0.1, rtol=0)
    assert samples.std(dim=0).min() > 0.05


def test_a_layout_made_without_gradients_serves_training() -> None:
    arguments = _problem([5, 8], [7, 3])[:5]
    with torch.inference_mode():
        expected = ak.packed_attention(*arguments)
    got = ak.packed_attention(*arguments)
    assert_close(got, expected)
    got.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    *exact, bias = _problem([5, 8], [7, 3])
    half = [x.to(dtype) for x in exact[:3]]
    got = ak.packed_attention(*half, *exact[3:], distance_bias=bias.float())
    assert got.dtype == dtype
    assert_close(got.double(), ak.packed_attention(*exact, distance_bias=bias), atol=3e-2, rtol=3e-2)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_flex_attention_computes_the_same(causal: bool, biased: bool) -> None:
    """The forward pass alone: FlexAttention has no gradient on the CPU."""
    *arguments, bias = (x.detach() for x in _problem([5, 0, 3, 9], [2, 4, 0, 7]))
    of_key = torch.randn(len(arguments[1]), dtype=torch.float64)
    options = (
        {"distance_bias": bias, "key_bias": of_key} if biased else {"distance_bias": None, "key_bias": None}
    )
    options |= {"causal": causal, "dropout": 0.0}
    expected = attention.packed_attention(*arguments, **options)
    assert_close(attention_flex.packed_attention(*arguments, **options), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_an_empty_pass_of_flex_attention_has_a_gradient_for_everything(lengths: list[int]) -> None:
    """Ranks of ZeRO stage 3 that make a pass with nothing must reach every weight, that of the distances too."""
    leaves = [torch.zeros(0, 2, 16, requires_grad=True) for _ in range(3)]
    bias, of_key = torch.randn(2, 9, requires_grad=True), torch.zeros(0, requires_grad=True)
    sizes = torch.tensor(lengths, dtype=torch.int64)
    attended = attention_flex.packed_attention(
        *leaves, sizes, sizes, distance_bias=bias, key_bias=of_key, causal=False, dropout=0.0
    )
    assert attended.shape == (0, 2, 16)
    for leaf, gradient in zip(
        [*leaves, bias, of_key], torch.autograd.grad(attended.sum(), [*leaves, bias, of_key]), strict=True
    ):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_flex_attention(causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([70, 0, 3, 200])
    leaves = [torch.randn(273, 2, 16, generator=generator).cuda().requires_grad_() for _ in range(3)]
    bias = torch.randn(2, 257, generator=generator).cuda().requires_grad_()
    of_key = torch.randn(273, generator=generator).cuda().requires_grad_()
    results = [
        run(*leaves, lengths, lengths, distance_bias=bias, key_bias=of_key, causal=causal, dropout=0.0)
        for run in (attention.packed_attention, attention_flex.packed_attention)
    ]
    assert_close(results[1], results[0], atol=2e-3, rtol=2e-3)
    upstream = torch.randn(results[0].shape, generator=generator).cuda()
    gradients = (torch.autograd.grad(x, [*leaves, bias, of_key], upstream) for x in results)
    for expected, got in zip(*gradients, strict=True):
        assert_close(got, expected, atol=1e-2, rtol=1e-2)
