"""Double-precision gradient checks of every differentiable operator (they run on the reference)."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import atomas_kernels as ak


def _leaf(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def _lengths(*sizes: int) -> Tensor:
    return torch.tensor(sizes)


def test_segment_softmax(generator: torch.Generator) -> None:
    lengths = _lengths(3, 0, 1, 4)
    assert gradcheck(lambda x: ak.segment_softmax(x, lengths), _leaf(generator, 8))


def test_cluster_merge(generator: torch.Generator) -> None:
    lengths = _lengths(5, 0, 1, 4)
    tokens, score = _leaf(generator, 10, 3), _leaf(generator, 10)
    assignment, counts = ak.dpc_knn(tokens, lengths, ratio=0.5)
    assert counts.tolist() == [3, 0, 1, 2]
    assert gradcheck(lambda x, s: ak.cluster_merge(x, s.exp(), assignment, lengths, counts), (tokens, score))


def test_token_interaction(generator: torch.Generator) -> None:
    text_lengths, smiles_lengths = _lengths(4, 0, 3), _lengths(2, 5, 0, 1)
    text, smiles = _leaf(generator, 7, 5), _leaf(generator, 8, 5)
    w, v = _leaf(generator, 7), _leaf(generator, 8)

    def scores(text: Tensor, smiles: Tensor, w: Tensor, v: Tensor) -> Tensor:
        w, v = ak.segment_softmax(w, text_lengths), ak.segment_softmax(v, smiles_lengths)
        return ak.token_interaction(text, smiles, w, v, text_lengths, smiles_lengths)

    assert gradcheck(scores, (text, smiles, w, v))


@pytest.mark.parametrize("masked", [False, True])
def test_info_nce(generator: torch.Generator, masked: bool) -> None:
    mask = torch.rand(4, 4, generator=generator) < 0.4 if masked else None
    scale = torch.full((1,), 3.0, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda s, c: ak.info_nce(s, c, negative_mask=mask), (_leaf(generator, 4, 4), scale))


@pytest.mark.parametrize("masked", [False, True])
def test_contrastive_cross_entropy(generator: torch.Generator, masked: bool) -> None:
    query, keys, momentum_query = _leaf(generator, 3, 4), _leaf(generator, 7, 4), _leaf(generator, 3, 4)
    temperature = torch.full((1,), 0.7, dtype=torch.float64, requires_grad=True)
    ignore = torch.rand(3, 7, generator=generator) < 0.4 if masked else None
    positive = torch.tensor([2, 0, 6])
    options = {"alpha": 0.4, "ignore": ignore}
    # Targets carry no gradient: they are frozen at the point of evaluation, as an explicit constant.
    x = query @ keys.T / temperature
    y = momentum_query @ keys.T / temperature
    if ignore is not None:
        ignore = ignore.scatter(1, positive[:, None], False)
        x, y = x.masked_fill(ignore, -1e30), y.masked_fill(ignore, -1e30)
    targets = 0.4 * y.softmax(1) + 0.6 * torch.nn.functional.one_hot(positive, 7)
    expected = -(targets.detach() * x.log_softmax(1)).sum(1).mean()
    loss = ak.contrastive_cross_entropy(query, momentum_query, keys, positive, temperature, **options)
    torch.testing.assert_close(loss, expected)
    leaves = (query, keys, temperature)
    for got, wanted in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(got, wanted)
    # With alpha = 0 there is nothing frozen and the numeric derivative applies.
    assert gradcheck(
        lambda q, k, t: ak.contrastive_cross_entropy(
            q, momentum_query, k, positive, t, alpha=0.0, ignore=ignore
        ),
        leaves,
    )


def test_lm_cross_entropy(generator: torch.Generator) -> None:
    labels = torch.tensor([1, -100, 6, 0, -100, 3])
    hidden, weight = _leaf(generator, 6, 4), _leaf(generator, 7, 4)
    assert gradcheck(lambda h, w: ak.lm_cross_entropy(h, w, labels), (hidden, weight))


@pytest.mark.parametrize("causal", [False, True])
def test_packed_attention(generator: torch.Generator, causal: bool) -> None:
    query_lengths, key_lengths = _lengths(3, 0, 1, 3), _lengths(5, 2, 0, 5)
    leaves = (_leaf(generator, 7, 2, 3), _leaf(generator, 12, 2, 3), _leaf(generator, 12, 2, 3))
    bias, of_key = _leaf(generator, 2, 5), _leaf(generator, 12)
    assert gradcheck(
        lambda q, k, v, b, c: ak.packed_attention(
            q, k, v, query_lengths, key_lengths, distance_bias=b, key_bias=c, causal=causal
        ),
        (*leaves, bias, of_key),
    )
