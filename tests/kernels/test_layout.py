"""Padded tensors and running sums are taken like ragged tokens with lengths."""

import pytest
import torch
from torch.testing import assert_close

import atomas_kernels as ak

LENGTHS = torch.tensor([5, 0, 1, 8])
OTHERS = torch.tensor([3, 7, 2, 0])
WIDTH = 6


def _padded(lengths: torch.Tensor, *shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged values and the same padded to a little more than needed, with NaN where nothing may read."""
    places = int(lengths.max()) + 2
    padded = torch.randn(len(lengths), places, *shape, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(places) < lengths[:, None]
    ragged = padded[mask].clone()
    padded[~mask] = torch.nan
    return ragged.requires_grad_(), padded.requires_grad_()


def test_lengths_and_their_running_sum() -> None:
    running = ak.cu_seqlens_from_lengths(LENGTHS)
    assert running.tolist() == [0, 5, 5, 6, 14]
    assert running.dtype == torch.int32
    assert torch.equal(ak.lengths_from_cu_seqlens(running), LENGTHS)
    assert ak.lengths_from_cu_seqlens(torch.tensor([0])).shape == (0,)


@pytest.mark.parametrize("bad", [[0, 5, 3], [1, 2], []])
def test_what_is_no_running_sum_is_refused(bad: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^cu_seqlens: "):
        ak.lengths_from_cu_seqlens(torch.tensor(bad, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"^cu_seqlens: "):
        ak.lengths_from_cu_seqlens(torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_interaction_of_padded_tokens(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "native":
        pytest.importorskip("atomas_kernels._native", reason="the native module is not built")
    monkeypatch.setattr("atomas_kernels.registry._chosen", backend)
    sides = [_padded(LENGTHS, WIDTH), _padded(OTHERS, WIDTH, seed=1)]
    weights = [_padded(LENGTHS, seed=2), _padded(OTHERS, seed=3)]

    def run(text: int, smiles: int) -> tuple[torch.Tensor, ...]:
        inputs = [sides[0][text], sides[1][smiles], weights[0][text], weights[1][smiles]]
        scores = ak.token_interaction(*inputs, LENGTHS, OTHERS)
        return scores, *torch.autograd.grad(scores.sum(), inputs)

    expected = run(0, 0)
    for text, smiles in ((1, 1), (0, 1), (1, 0)):
        scores, *gradients = run(text, smiles)
        assert torch.equal(scores, expected[0])
        for padded, lengths, gradient, reference in zip(
            (text, smiles) * 2, (LENGTHS, OTHERS) * 2, gradients, expected[1:], strict=True
        ):
            if padded:
                mask = torch.arange(gradient.shape[1]) < lengths[:, None]
                assert not gradient[~mask].any()
                gradient = gradient[mask]
            assert torch.equal(gradient, reference)


def test_clustering_of_padded_tokens() -> None:
    ragged, padded = _padded(LENGTHS, WIDTH)
    weight, padded_weight = _padded(LENGTHS, seed=1)
    labels, counts = ak.dpc_knn(ragged, LENGTHS, ratio=0.5)
    padded_labels, padded_counts = ak.dpc_knn(padded, LENGTHS, ratio=0.5)
    mask = torch.arange(padded.shape[1]) < LENGTHS[:, None]
    assert torch.equal(padded_counts, counts)
    assert torch.equal(padded_labels[mask], labels)
    assert (padded_labels[~mask] == -1).all()

    merged = ak.cluster_merge(ragged, weight, labels, LENGTHS, counts)
    padded_merged = ak.cluster_merge(padded, padded_weight, padded_labels, LENGTHS, counts)
    assert padded_merged.shape == (4, 4, WIDTH)
    held = torch.arange(4) < counts[:, None]
    assert torch.equal(padded_merged[held], merged)
    assert not padded_merged[~held].any()
    (expected,) = torch.autograd.grad(merged.square().sum(), ragged)
    (gradient,) = torch.autograd.grad(padded_merged.square().sum(), padded)
    assert_close(gradient[mask], expected)
    assert not gradient[~mask].any()


def test_softmax_of_padded_logits() -> None:
    ragged, padded = _padded(LENGTHS)
    mask = torch.arange(padded.shape[1]) < LENGTHS[:, None]
    weights = ak.segment_softmax(padded, LENGTHS)
    assert torch.equal(weights[mask], ak.segment_softmax(ragged, LENGTHS))
    assert not weights[~mask].any()


@pytest.mark.parametrize("lengths", [[5, -1, 1, 8], [5, 0, 1, 11], [5, 0, 1]])
def test_lengths_that_do_not_fit_the_rows(lengths: list[int]) -> None:
    _, padded = _padded(LENGTHS, WIDTH)
    with pytest.raises(ValueError, match=r"^lengths: "):
        ak.dpc_knn(padded, torch.tensor(lengths), ratio=0.5)


@pytest.mark.parametrize("queued", [0, 5])
@pytest.mark.parametrize("ignored", [False, True])
def test_a_queue_is_more_keys(queued: int, ignored: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, slow, keys = torch.randn(3, 4, WIDTH, generator=generator, dtype=torch.float64)
    queue = torch.randn(queued, WIDTH, generator=generator, dtype=torch.float64)
    ignore = torch.rand(4, 4 + queued, generator=generator) < 0.4 if ignored else None
    rest = (torch.arange(4), torch.tensor([0.3], dtype=torch.float64))
    together = ak.contrastive_cross_entropy(
        query, slow, torch.cat([keys, queue]), *rest, alpha=0.4, ignore=ignore
    )
    apart = ak.contrastive_cross_entropy(query, slow, keys, *rest, alpha=0.4, queue=queue, ignore=ignore)
    assert_close(apart, together)
