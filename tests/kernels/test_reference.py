"""The reference against independent forms: padded einsum, explicit loops, torch's own losses."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import atomas_kernels as ak
from atomas_kernels.reference import interaction, language_model

SIZES = st.lists(st.integers(0, 9), min_size=0, max_size=5)


def _ragged(sizes: list[int], width: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(sizes), width, generator=generator), torch.tensor(sizes, dtype=torch.int64)


def _weights(lengths: Tensor, seed: int) -> Tensor:
    logits = torch.randn(int(lengths.sum()), generator=torch.Generator().manual_seed(seed))
    return ak.segment_softmax(logits, lengths)


@settings(max_examples=25, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_segment_softmax_is_a_softmax_per_sequence(sizes: list[int], seed: int) -> None:
    logits, lengths = _ragged(sizes, 1, seed)
    expected = [part.softmax(0) for part in logits.squeeze(1).split(sizes)] or [logits.new_empty(0)]
    torch.testing.assert_close(ak.segment_softmax(logits.squeeze(1), lengths), torch.cat(expected))


def test_segment_softmax_of_an_all_masked_sequence_is_zero() -> None:
    logits = torch.tensor([-torch.inf, -torch.inf, 1.0], requires_grad=True)
    weights = ak.segment_softmax(logits, torch.tensor([2, 1]))
    assert weights.tolist() == [0, 0, 1]
    weights.sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def _pair_score(t: Tensor, s: Tensor, w: Tensor, v: Tensor) -> Tensor:
    if len(t) == 0 or len(s) == 0:
        return torch.zeros(())
    similarity = F.normalize(t, dim=1) @ F.normalize(s, dim=1).T
    return (w @ similarity.amax(1) + v @ similarity.amax(0)) / 2


@settings(max_examples=25, deadline=None)
@given(texts=SIZES, molecules=SIZES, seed=st.integers(0, 99))
def test_token_interaction_is_a_loop_over_pairs(texts: list[int], molecules: list[int], seed: int) -> None:
    text, text_lengths = _ragged(texts, 6, seed)
    smiles, smiles_lengths = _ragged(molecules, 6, seed + 1)
    w, v = _weights(text_lengths, seed), _weights(smiles_lengths, seed + 1)
    scores = ak.token_interaction(text, smiles, w, v, text_lengths, smiles_lengths)
    assert scores.shape == (len(texts), len(molecules))
    for a, (t, wa) in enumerate(zip(text.split(texts), w.split(texts), strict=True)):
        for b, (s, vb) in enumerate(zip(smiles.split(molecules), v.split(molecules), strict=True)):
            torch.testing.assert_close(scores[a, b], _pair_score(t, s, wa, vb), atol=2e-6, rtol=1e-5)


def test_token_interaction_does_not_depend_on_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    text, text_lengths = _ragged([3, 0, 5], 6, 0)
    smiles, smiles_lengths = _ragged([4, 1, 0, 7], 6, 1)
    arguments = (text, smiles, _weights(text_lengths, 0), _weights(smiles_lengths, 1))
    whole = interaction.token_interaction(*arguments, text_lengths, smiles_lengths)
    monkeypatch.setattr(interaction, "_SIMILARITIES_PER_BLOCK", 1)
    torch.testing.assert_close(
        interaction.token_interaction(*arguments, text_lengths, smiles_lengths), whole, atol=1e-6, rtol=0
    )


def _published_clustering(x: Tensor, ratio: float, k: int) -> Tensor:
    """The definition of method.md 3.1 with loops, in float64."""
    n = len(x)
    distance = [[math.dist(a, b) / math.sqrt(x.shape[1]) for b in x.tolist()] for a in x.tolist()]
    density = [math.exp(-sum(d * d for d in sorted(row)[:k]) / min(k, n)) for row in distance]
    importance = []
    for i in range(n):
        denser = [j for j in range(n) if (density[j], -j) > (density[i], -i)]
        delta = min(distance[i][j] for j in denser) if denser else max(map(max, distance))
        importance.append(density[i] * delta)
    centres = sorted(range(n), key=lambda i: (-importance[i], i))[: math.ceil(ratio * n)]
    labels = [min(range(len(centres)), key=lambda c: (distance[i][centres[c]], c)) for i in range(n)]
    for number, centre in enumerate(centres):
        labels[centre] = number
    return torch.tensor(labels, dtype=torch.int64)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 14), min_size=1, max_size=4),
    ratio=st.sampled_from([0.25, 0.5, 1.0]),
    k=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_dpc_knn_is_its_definition(sizes: list[int], ratio: float, k: int, seed: int) -> None:
    tokens, lengths = _ragged(sizes, 4, seed)
    tokens = tokens.double()
    assignment, counts = ak.dpc_knn(tokens, lengths, ratio=ratio, k=k)
    assert counts.tolist() == [math.ceil(ratio * n) for n in sizes]
    for part, x in zip(assignment.split(sizes), tokens.split(sizes), strict=True):
        assert torch.equal(part, _published_clustering(x, ratio, k))


def test_cluster_count_of_an_inexact_product() -> None:
    tokens = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    assert ak.dpc_knn(tokens, torch.tensor([100]), ratio=0.07)[1].tolist() == [7]


def test_cluster_merge_is_a_weighted_mean() -> None:
    tokens, lengths = _ragged([5, 0, 3], 4, 0)
    weight = torch.rand(8, generator=torch.Generator().manual_seed(1))
    assignment, counts = torch.tensor([1, 0, 1, 1, 0, 0, 0, 0]), torch.tensor([2, 0, 2])
    merged = ak.cluster_merge(tokens, weight, assignment, lengths, counts)
    members = ([1, 4], [0, 2, 3], [5, 6, 7])
    for row, index in zip(merged, members, strict=False):
        expected = (weight[index, None] * tokens[index]).sum(0) / (weight[index].sum() + 1e-6)
        torch.testing.assert_close(row, expected)
    assert not merged[3].any()


def test_info_nce_leaves_masked_pairs_out() -> None:
    scores = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([2.0])
    target = torch.arange(3)
    expected = (F.cross_entropy(scores * 2, target) + F.cross_entropy(scores.T * 2, target)) / 2
    torch.testing.assert_close(ak.info_nce(scores, scale), expected)
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[0, 1] = mask[1, 1] = True
    changed = scores.clone()
    changed[0, 1] = 50.0
    assert ak.info_nce(changed, scale, negative_mask=mask) < 10
    assert ak.info_nce(scores, scale, negative_mask=mask) < expected
    assert ak.info_nce(torch.empty(0, 0), scale) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lm_cross_entropy_is_torch_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, generator: torch.Generator
) -> None:
    monkeypatch.setattr(language_model, "_LOGITS_PER_CHUNK", {"cpu": 3 * 11})
    hidden = torch.randn(10, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(11, 8, generator=generator).to(dtype).requires_grad_()
    labels = torch.tensor([0, -100, 10, 4, -100, -100, 3, 3, 9, 1])
    loss = ak.lm_cross_entropy(hidden, weight, labels)
    got = torch.autograd.grad(2 * loss, (hidden, weight))
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    expected = F.cross_entropy(exact[0] @ exact[1].T, labels)
    wanted = torch.autograd.grad(2 * expected, exact)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(loss.double(), expected, atol=tolerance, rtol=tolerance)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, atol=tolerance, rtol=tolerance)


def test_lm_cross_entropy_without_valid_labels_is_zero() -> None:
    hidden, weight = torch.ones(2, 3, requires_grad=True), torch.ones(5, 3, requires_grad=True)
    loss = ak.lm_cross_entropy(hidden, weight, torch.tensor([-100, -100]))
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_momentum_update_keeps_float32_precision() -> None:
    targets = [torch.ones(3), torch.zeros(2, 2)]
    sources = [torch.zeros(3), torch.ones(2, 2, dtype=torch.bfloat16)]
    pointers = [t.data_ptr() for t in targets]
    for _ in range(10):
        ak.momentum_update(targets, sources, 0.995)
    assert [t.data_ptr() for t in targets] == pointers
    torch.testing.assert_close(targets[0], torch.full((3,), 0.995**10))
    torch.testing.assert_close(targets[1], torch.full((2, 2), 1 - 0.995**10))
    ak.momentum_update([], [], 0.5)


def test_empty_batches(each_backend: str) -> None:
    none = torch.empty(0, dtype=torch.int64)
    flat = torch.empty(0, 4, requires_grad=True)
    assert ak.segment_softmax(torch.empty(0), none).shape == (0,)
    assignment, counts = ak.dpc_knn(flat, none, ratio=0.5)
    assert assignment.shape == counts.shape == (0,)
    assert ak.cluster_merge(flat, torch.empty(0), assignment, none, counts).shape == (0, 4)
    zero = torch.zeros(2, dtype=torch.int64)
    for text_lengths, smiles_lengths in ((none, none), (none, zero), (zero, none), (zero, zero)):
        scores = ak.token_interaction(
            flat, flat, torch.empty(0), torch.empty(0), text_lengths, smiles_lengths
        )
        assert scores.shape == (len(text_lengths), len(smiles_lengths))
        assert not scores.any()
        scores.sum().backward()
    loss = ak.contrastive_cross_entropy(
        flat, flat, torch.randn(3, 4), none, torch.tensor([0.1]), alpha=0.4, ignore=None
    )
    assert loss == 0


_X, _N = torch.randn(5, 4), torch.tensor([2, 3])


@pytest.mark.parametrize(
    ("error", "name", "call"),
    [
        (ValueError, "lengths", lambda: ak.dpc_knn(_X, torch.tensor([2, 2]), ratio=0.5)),
        (ValueError, "lengths", lambda: ak.dpc_knn(_X, torch.tensor([6, -1]), ratio=0.5)),
        (TypeError, "lengths", lambda: ak.dpc_knn(_X, torch.tensor([2.0, 3.0]), ratio=0.5)),
        (TypeError, "lengths", lambda: ak.dpc_knn(_X, [2, 3], ratio=0.5)),
        (ValueError, "lengths", lambda: ak.dpc_knn(_X, _N.to("meta"), ratio=0.5)),
        (TypeError, "tokens", lambda: ak.dpc_knn(_X.long(), _N, ratio=0.5)),
        (ValueError, "tokens", lambda: ak.dpc_knn(_X[0], _N, ratio=0.5)),
        (ValueError, "ratio", lambda: ak.dpc_knn(_X, _N, ratio=0.0)),
        (ValueError, "ratio", lambda: ak.dpc_knn(_X, _N, ratio=math.nan)),
        (ValueError, "k", lambda: ak.dpc_knn(_X, _N, ratio=0.5, k=0)),
        (TypeError, "k", lambda: ak.dpc_knn(_X, _N, ratio=0.5, k=2.0)),
        (ValueError, "weight", lambda: ak.cluster_merge(_X, _X[:3, 0], torch.zeros(5).long(), _N, _N)),
        (ValueError, "assignment", lambda: ak.cluster_merge(_X, _X[:, 0], torch.full((5,), 2), _N, _N)),
        (ValueError, "assignment", lambda: ak.cluster_merge(_X, _X[:, 0], torch.full((5,), -1), _N, _N)),
        (ValueError, "smiles", lambda: ak.token_interaction(_X, _X[:, :3], _X[:, 0], _X[:, 0], _N, _N)),
        (TypeError, "smiles", lambda: ak.token_interaction(_X, _X.half(), _X[:, 0], _X[:, 0], _N, _N)),
        (
            ValueError,
            "smiles_lengths",
            lambda: ak.token_interaction(_X, _X, _X[:, 0], _X[:, 0], _N, torch.tensor([7])),
        ),
        (ValueError, "scores", lambda: ak.info_nce(_X, torch.ones(1))),
        (ValueError, "scale", lambda: ak.info_nce(_X[:4], torch.ones(()))),
        (TypeError, "negative_mask", lambda: ak.info_nce(_X[:4], torch.ones(1), negative_mask=_X[:4])),
        (ValueError, "labels", lambda: ak.lm_cross_entropy(_X, _X, torch.full((5,), 5))),
        (TypeError, "targets", lambda: ak.momentum_update([_X.half()], [_X], 0.5)),
        (ValueError, "sources", lambda: ak.momentum_update([_X], [_X[:2]], 0.5)),
        (ValueError, "momentum", lambda: ak.momentum_update([_X], [_X], 1.5)),
    ],
)
def test_errors_name_the_argument(
    each_backend: str, error: type[Exception], name: str, call: Callable[[], object]
) -> None:
    with pytest.raises(error, match=rf"^{name}: "):
        call()
