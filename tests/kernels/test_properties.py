"""What holds for every operator on every CPU backend, whatever the lengths.

The result of a sequence depends neither on the padding around it nor on the order or company of its batch, and
two runs give the same bits. Gradients are results as well.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import atomas_kernels as ak

HEADS, WIDTH = 2, 8

Row = dict[str, Tensor]
"""The tensors of one sequence."""


class Ragged:
    """Sequences one after another."""

    @staticmethod
    def join(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))

    @staticmethod
    def split(flat: Tensor, lengths: Tensor) -> list[Tensor]:
        return list(flat.split(lengths.tolist()))


class Padded:
    """Sequences in a row each, with NaN where nothing may read."""

    @staticmethod
    def join(parts: Sequence[Tensor]) -> Tensor:
        places = max(len(part) for part in parts) + 3
        rows = []
        for part in parts:
            fill = torch.nan if part.is_floating_point() else -7
            rows.append(torch.cat([part, part.new_full((places - len(part), *part.shape[1:]), fill)]))
        return torch.stack(rows)

    @staticmethod
    def split(padded: Tensor, lengths: Tensor) -> list[Tensor]:
        return [row[:length] for row, length in zip(padded, lengths.tolist(), strict=True)]


Layout = type[Ragged] | type[Padded]
Operator = Callable[[list[Row], Layout], list[Tensor]]


def _lengths(rows: list[Row], name: str = "tokens") -> Tensor:
    return torch.tensor([len(row[name]) for row in rows])


def _joined(rows: list[Row], layout: Layout, *names: str) -> list[Tensor]:
    return [layout.join([row[name] for row in rows]) for name in names]


def _softmax(rows: list[Row], layout: Layout) -> list[Tensor]:
    lengths = _lengths(rows)
    return layout.split(ak.segment_softmax(*_joined(rows, layout, "score"), lengths), lengths)


def _cluster(rows: list[Row], layout: Layout) -> list[Tensor]:
    lengths = _lengths(rows)
    return layout.split(ak.dpc_knn(*_joined(rows, layout, "tokens"), lengths, ratio=0.4, k=3)[0], lengths)


def _merge(rows: list[Row], layout: Layout) -> list[Tensor]:
    tokens, score = _joined(rows, layout, "tokens", "score")
    lengths = _lengths(rows)
    labels, counts = ak.dpc_knn(tokens, lengths, ratio=0.4, k=3)
    return layout.split(ak.cluster_merge(tokens, score.exp(), labels, lengths, counts), counts)


def _attention(rows: list[Row], layout: Layout) -> list[Tensor]:
    query, key, value = _joined(rows, layout, "query", "key", "value")
    lengths = _lengths(rows, "query"), _lengths(rows, "key")
    bias = torch.linspace(-1, 1, HEADS * 7).view(HEADS, 7)
    return layout.split(ak.packed_attention(query, key, value, *lengths, distance_bias=bias), lengths[0])


PER_SEQUENCE: dict[str, Operator] = {
    "segment_softmax": _softmax,
    "dpc_knn": _cluster,
    "cluster_merge": _merge,
    "packed_attention": _attention,
}
NOT_BITWISE = {"packed_attention"}
"""Equal up to rounding: sequences of equal lengths are multiplied together."""

SIZES = st.lists(
    st.tuples(st.sampled_from([0, 1, 2, 3, 5, 8, 17]), st.sampled_from([0, 1, 2, 4, 9, 16])),
    min_size=1,
    max_size=5,
)
properties = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def _rows(sizes: list[tuple[int, int]], seed: int) -> list[Row]:
    """Sequences of n tokens, queries among them, and m keys; some tokens are duplicates, which ties distances."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for n, m in sizes:
        tokens = torch.randn(n, WIDTH, generator=generator)
        if n > 2:
            tokens[2] = tokens[0]
        attention = {
            name: torch.randn(size, HEADS, WIDTH, generator=generator)
            for name, size in (("query", n), ("key", m), ("value", m))
        }
        rows.append({"tokens": tokens, "score": torch.randn(n, generator=generator), **attention})
    return rows


def _results(operator: Operator, rows: list[Row], layout: Layout = Ragged) -> list[list[Tensor]]:
    """For each sequence its output, and the gradients of its tensors."""
    leaves = [{name: value.clone().requires_grad_() for name, value in row.items()} for row in rows]
    outputs = operator(leaves, layout)
    if not outputs[0].is_floating_point():
        return [[output] for output in outputs]
    loss = sum((output * _upstream(output)).sum() for output in outputs)
    flat = [value for row in leaves for value in row.values()]
    gradients = torch.autograd.grad(loss, flat, allow_unused=True, materialize_grads=True)
    per_row = len(flat) // len(rows)
    return [
        [output.detach(), *gradients[i * per_row : (i + 1) * per_row]] for i, output in enumerate(outputs)
    ]


def _upstream(output: Tensor) -> Tensor:
    """Depends on nothing but the shape."""
    return torch.arange(1, output.numel() + 1, dtype=output.dtype).cos().view(output.shape)


def _assert_same(got: list[list[Tensor]], expected: list[list[Tensor]], *, bitwise: bool) -> None:
    for row, wanted in zip(got, expected, strict=True):
        for a, b in zip(row, wanted, strict=True):
            if bitwise:
                assert torch.equal(a, b)
            else:
                assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PER_SEQUENCE)
@properties
@given(sizes=SIZES, seed=st.integers(0, 999))
def test_padding_is_never_read(each_backend: str, name: str, sizes: list[tuple[int, int]], seed: int) -> None:
    operator, rows = PER_SEQUENCE[name], _rows(sizes, seed)
    _assert_same(_results(operator, rows, Padded), _results(operator, rows), bitwise=True)


@pytest.mark.parametrize("name", PER_SEQUENCE)
@properties
@given(sizes=SIZES, seed=st.integers(0, 999))
def test_order_and_company_of_a_batch_do_not_matter(
    each_backend: str, name: str, sizes: list[tuple[int, int]], seed: int
) -> None:
    operator, rows = PER_SEQUENCE[name], _rows(sizes, seed)
    together = _results(operator, rows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    moved = _results(operator, [rows[i] for i in order])
    bitwise = name not in NOT_BITWISE
    _assert_same(moved, [together[i] for i in order], bitwise=bitwise)
    alone = [_results(operator, [row])[0] for row in rows]
    _assert_same(alone, together, bitwise=bitwise)


@pytest.mark.parametrize("name", PER_SEQUENCE)
@properties
@given(sizes=SIZES, seed=st.integers(0, 999))
def test_two_runs_are_equal(each_backend: str, name: str, sizes: list[tuple[int, int]], seed: int) -> None:
    operator, rows = PER_SEQUENCE[name], _rows(sizes, seed)
    _assert_same(_results(operator, rows), _results(operator, rows), bitwise=True)


def _interaction(texts: list[Row], molecules: list[Row], layout: Layout = Ragged) -> list[Tensor]:
    """Scores, and the gradients of tokens and weights of both sides, sequence after sequence."""
    sides = []
    for rows in (texts, molecules):
        leaves = [{name: row[name].clone().requires_grad_() for name in ("tokens", "score")} for row in rows]
        sides.append((leaves, *_joined(leaves, layout, "tokens", "score"), _lengths(rows)))
    (text, t, w, text_lengths), (smiles, s, v, smiles_lengths) = sides
    scores = ak.token_interaction(t, s, w, v, text_lengths, smiles_lengths)
    leaves = [leaf for row in (*text, *smiles) for leaf in row.values()]
    # The same upstream gradient for every pair, so that it moves with them.
    return [scores.detach(), *torch.autograd.grad(scores.square().sum(), leaves)]


@properties
@given(texts=SIZES, molecules=SIZES, seed=st.integers(0, 999))
def test_token_interaction(
    each_backend: str, texts: list[tuple[int, int]], molecules: list[tuple[int, int]], seed: int
) -> None:
    text, smiles = _rows(texts, seed), _rows(molecules, seed + 1)
    scores, *gradients = _interaction(text, smiles)
    for layout in (Ragged, Padded):
        for a, b in zip(_interaction(text, smiles, layout), (scores, *gradients), strict=True):
            assert torch.equal(a, b)

    generator = torch.Generator().manual_seed(seed)
    row_order, column_order = (torch.randperm(len(x), generator=generator) for x in (text, smiles))
    moved, *moved_gradients = _interaction([text[i] for i in row_order], [smiles[i] for i in column_order])
    expected = [2 * i + j for i in row_order.tolist() for j in (0, 1)]
    expected += [2 * (len(text) + i) + j for i in column_order.tolist() for j in (0, 1)]
    bitwise = each_backend == "native"
    # Gradients are sums over the other side, in its order.
    for a, index in zip(moved_gradients, expected, strict=True):
        assert_close(a, gradients[index], atol=1e-5, rtol=1e-5)
    _assert_same([[moved]], [[scores[row_order][:, column_order]]], bitwise=bitwise)
    for i, row in enumerate(text):
        alone = _interaction([row], smiles[:1])[0]
        _assert_same([[alone]], [[scores[i : i + 1, :1]]], bitwise=bitwise)


def _losses(count: int, seed: int) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Losses over a batch of `count`, which take their leaves and the order of the batch; and the leaves."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    scale = torch.full((1,), 2.0, requires_grad=True)
    slow, keys, queue = leaf(count, WIDTH).detach(), leaf(count, WIDTH).detach(), leaf(7, WIDTH).detach()
    labels = torch.randint(-1, 9, (count,), generator=generator)

    def contrastive(query: Tensor, temperature: Tensor, order: Tensor) -> Tensor:
        own = torch.arange(count)
        ignore = torch.rand(count, count + 7, generator=torch.Generator().manual_seed(seed)) < 0.3
        columns = torch.cat([order, count + torch.arange(7)])
        return ak.contrastive_cross_entropy(
            query[order], slow[order], keys[order], own, temperature,
            alpha=0.4, queue=queue, ignore=ignore[order][:, columns],
        )  # fmt: skip

    return {
        "info_nce": (lambda s, c, order: ak.info_nce(s[order][:, order], c), [leaf(count, count), scale]),
        "contrastive_cross_entropy": (contrastive, [leaf(count, WIDTH), scale]),
        "lm_cross_entropy": (
            lambda h, w, order: ak.lm_cross_entropy(h[order], w, labels[order], ignore_index=-1),
            [leaf(count, WIDTH), leaf(9, WIDTH)],
        ),
    }


@pytest.mark.parametrize("name", ["info_nce", "contrastive_cross_entropy", "lm_cross_entropy"])
@properties
@given(count=st.sampled_from([0, 1, 2, 5, 17]), seed=st.integers(0, 999))
def test_losses(each_backend: str, name: str, count: int, seed: int) -> None:
    loss, leaves = _losses(count, seed)[name]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))

    def run(order: Tensor) -> list[Tensor]:
        value = loss(*leaves, order)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    first = run(torch.arange(count))
    _assert_same([run(torch.arange(count))], [first], bitwise=True)
    _assert_same([run(order)], [first], bitwise=False)


@properties
@given(sizes=st.lists(st.integers(0, 9), max_size=4), seed=st.integers(0, 999))
def test_momentum_update(each_backend: str, sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    targets, sources = ([torch.randn(n, generator=generator) for n in sizes] for _ in range(2))

    def run(order: list[int]) -> list[Tensor]:
        updated = [targets[i].clone() for i in order]
        ak.momentum_update(updated, [sources[i] for i in order], 0.9)
        return updated

    straight = list(range(len(sizes)))
    expected = run(straight)
    _assert_same([run(straight), run(straight[::-1])], [expected, expected[::-1]], bitwise=True)
    _assert_same([[x for i in straight for x in run([i])]], [expected], bitwise=True)
