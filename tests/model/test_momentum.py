"""Momentum copy, queue and global loss."""

from collections import deque
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from atomas.config import MomentumConfig
from atomas.data.batching import PairBatch, RaggedTokens
from atomas.model.global_batch import GlobalBatch, Identities
from atomas.model.momentum import FeatureQueue, Keys, MomentumTargets, global_loss
from atomas.model.momentum_encoder import Momentum


def _keys(ids: list[int]) -> Keys:
    numbers = torch.tensor(ids)
    features = numbers[:, None].float().expand(-1, 2)
    return Keys(text=features, smiles=-features, identities=Identities(text=numbers, molecule=100 + numbers))


@pytest.mark.parametrize("size", [1, 5, 8, 16])
@pytest.mark.parametrize("batches", [[3, 3, 3, 3], [8, 8], [20, 1, 7], [1] * 9])
def test_queue_holds_the_last_entries(size: int, batches: list[int]) -> None:
    queue, expected = FeatureQueue(size, 2), deque[int](maxlen=size)
    count = 0
    for batch in batches:
        ids = list(range(count, count + batch))
        count += batch
        queue.push(_keys(ids))
        expected.extend(ids)
        held = queue.keys()
        assert sorted(held.identities.text.tolist()) == sorted(expected)
        assert_close(held.text[:, 0], held.identities.text.float())
        assert_close(held.smiles, -held.text)
        assert_close(held.identities.molecule, held.identities.text + 100)


def test_queue_of_size_zero_keeps_nothing() -> None:
    queue = FeatureQueue(0, 2)
    queue.push(_keys([1, 2]))
    assert queue.keys().text.shape == (0, 2)


def test_queue_continues_from_its_state() -> None:
    first, second = FeatureQueue(5, 2), FeatureQueue(5, 2)
    first.push(_keys([0, 1, 2]))
    second.load_state_dict(first.state_dict())
    for queue in (first, second):
        queue.push(_keys([3, 4, 5, 6]))
    assert_close(second.keys().identities.text, first.keys().identities.text)
    assert sorted(second.keys().identities.text.tolist()) == [2, 3, 4, 5, 6]


def test_update_moves_every_weight_by_the_coefficient(make_model: Any) -> None:
    model = make_model(pooling="attention")
    momentum = Momentum(model.encoder, MomentumConfig(coefficient=0.9))
    before = {name: value.clone() for name, value in momentum.named_parameters()}
    online = dict(model.named_parameters())
    assert before.keys() < online.keys()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    momentum.update([{name: value.double() for name, value in online.items()}])
    for name, value in momentum.named_parameters():
        assert not value.requires_grad
        assert_close(value, 0.9 * before[name] + 0.1 * online[name])


def test_small_updates_are_not_rounded_away(make_model: Any) -> None:
    model = make_model().to(torch.bfloat16)
    momentum = Momentum(model.encoder, MomentumConfig(coefficient=0.995))
    weight = dict(momentum.named_parameters())["encoder.backbone.t5.shared.weight"]
    before = weight.clone()
    sources = {name: value.float() * 1.01 for name, value in model.named_parameters()}
    momentum.update([sources])
    assert weight.dtype == torch.float32
    assert_close(weight - before, before * 0.01 * 0.005, rtol=1e-2, atol=1e-6)


def test_targets_see_the_queue_as_it_was(make_model: Any, make_batch: Any) -> None:
    model = make_model(dropout_rate=0.5)
    momentum = Momentum(model.encoder, MomentumConfig(queue_size=5)).train()
    batch = make_batch([4, 7, 2], [3, 3, 5])
    first = momentum.targets(batch)
    assert first.queue is not None
    assert len(first.keys.text) == 3
    assert len(first.queue.text) == 0
    assert_close(first.keys.text, first.text)
    assert_close(momentum.targets(batch).text, first.text)  # no dropout, no update in between
    momentum.enqueue(first)
    second = momentum.targets(batch)
    assert second.queue is not None
    assert_close(second.queue.text, first.text)
    assert len(second.identities.text) == 3 + 3
    momentum.enqueue(second)
    third = momentum.targets(batch).queue
    assert third is not None
    assert len(third.text) == 5
    assert_close(first.text.norm(dim=1), torch.ones(3))


def test_global_loss_is_the_method(make_batch: Any) -> None:
    torch.manual_seed(0)
    text, smiles, slow_text, slow_smiles = torch.nn.functional.normalize(torch.randn(4, 3, 8), dim=-1)
    queue = torch.nn.functional.normalize(torch.randn(2, 5, 8), dim=-1)
    fresh, queued = (Identities(text=torch.arange(n), molecule=torch.arange(n)) for n in (3, 5))
    everyone = GlobalBatch.of(make_batch([2, 2, 2], [2, 2, 2]))
    targets = MomentumTargets(
        text=slow_text,
        smiles=slow_smiles,
        keys=Keys(text=slow_text, smiles=slow_smiles, identities=fresh),
        everyone=everyone,
        queue=Keys(text=queue[0], smiles=queue[1], identities=queued),
    )
    all_text, all_smiles = torch.cat([slow_text, queue[0]]), torch.cat([slow_smiles, queue[1]])
    temperature = torch.tensor([0.2])

    expected = torch.zeros(())
    for query, slow, columns in ((text, slow_text, all_smiles), (smiles, slow_smiles, all_text)):
        soft = 0.4 * (slow @ columns.T / 0.2).softmax(1) + 0.6 * torch.eye(3, 8)
        expected += -(soft * (query @ columns.T / 0.2).log_softmax(1)).sum(1).mean() / 2
    found = global_loss(
        text, smiles, targets, torch.arange(3), temperature, alpha=0.4, false_negatives="keep"
    )
    assert_close(found, expected)


def test_several_positives_share_the_hard_target(make_batch: Any) -> None:
    torch.manual_seed(0)
    normal = torch.nn.functional.normalize
    text, smiles, slow_text, slow_smiles = normal(torch.randn(4, 3, 8, dtype=torch.float64), dim=-1)
    queue = normal(torch.randn(2, 4, 8, dtype=torch.float64), dim=-1)
    fresh = Identities(text=torch.tensor([1, 2, 3]), molecule=torch.tensor([7, 8, 7]))
    queued = Identities(text=torch.tensor([2, 9, -1, 3]), molecule=torch.tensor([6, 8, -1, 9]))
    targets = MomentumTargets(
        text=slow_text,
        smiles=slow_smiles,
        keys=Keys(text=slow_text, smiles=slow_smiles, identities=fresh),
        everyone=GlobalBatch.of(make_batch([2, 2, 2], [2, 2, 2])),
        queue=Keys(text=queue[0], smiles=queue[1], identities=queued),
    )
    related = torch.tensor(
        [[1, 0, 1, 0, 0, 0, 0], [0, 1, 0, 1, 1, 0, 0], [1, 0, 1, 0, 0, 0, 1]], dtype=torch.float64
    )
    hard = related / related.sum(1, keepdim=True)
    all_text, all_smiles = torch.cat([slow_text, queue[0]]), torch.cat([slow_smiles, queue[1]])
    leaves = [value.requires_grad_() for value in (text, smiles, torch.tensor([0.2], dtype=torch.float64))]

    expected = torch.zeros((), dtype=torch.float64)
    for query, slow, columns in ((text, slow_text, all_smiles), (smiles, slow_smiles, all_text)):
        soft = 0.4 * (slow @ columns.T / 0.2).softmax(1) + 0.6 * hard
        expected = expected - (soft * (query @ columns.T / leaves[2]).log_softmax(1)).sum(1).mean() / 2
    found = global_loss(
        text, smiles, targets, torch.arange(3), leaves[2], alpha=0.4, false_negatives="multi_positive"
    )
    assert_close(found, expected)
    assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves))


def test_identities_are_shared_by_text_or_molecule() -> None:
    rows = Identities(text=torch.tensor([1, 2]), molecule=torch.tensor([10, 20]))
    columns = Identities(text=torch.tensor([1, 9, -1]), molecule=torch.tensor([77, 20, -1]))
    assert rows.related_to(columns).tolist() == [[True, False, False], [False, True, False]]


def test_what_leaves_a_wrapping_queue_does_not_depend_on_the_order_in_the_batch(
    make_model: Any, make_batch: Any
) -> None:
    """The ranks deal a global batch among themselves, and another world size deals it otherwise."""
    model = make_model()
    first = make_batch([5, 9, 4], [6, 3, 8])
    turned = PairBatch(
        text=RaggedTokens.from_lists(
            [p.tolist() for p in reversed(first.text.ids.split(first.text.lengths.tolist()))]
        ),
        smiles=RaggedTokens.from_lists(
            [p.tolist() for p in reversed(first.smiles.ids.split(first.smiles.lengths.tolist()))]
        ),
        molecule_id=first.molecule_id.flip(0),
        text_id=first.text_id.flip(0),
        sample_id=first.sample_id.flip(0),
    )
    queues = []
    for batch in (first, turned):
        momentum = Momentum(model.encoder, MomentumConfig(queue_size=2))
        momentum.enqueue(momentum.targets(batch))
        queues.append(momentum.queue)
    assert torch.equal(queues[0].molecule_id, queues[1].molecule_id)
    torch.testing.assert_close(queues[0].text, queues[1].text)
    torch.testing.assert_close(queues[0].smiles, queues[1].smiles)


def test_ten_thousand_updates_are_the_closed_form(make_model: Any) -> None:
    """Weights that move by less than bf16 can tell, followed at m = 0.995; a bf16 average of them stays behind.

    With w_t = w_0 + t d and an average that begins at w_0: w_0 + d (n - m (1 - m^n) / (1 - m)).
    """
    steps, m, step = 10_000, 0.995, 1e-4
    model = make_model(num_layers=1, num_decoder_layers=1, d_model=8, d_kv=4, d_ff=4, num_heads=2).to(
        torch.bfloat16
    )
    momentum = Momentum(model.encoder, MomentumConfig(coefficient=m))
    name = "encoder.backbone.t5.shared.weight"
    masters = {key: value.detach().float() for key, value in model.named_parameters()}
    before = masters[name].clone()
    naive = before.bfloat16()
    for number in range(1, steps + 1):
        masters[name] = (before.double() + number * step).float()  # a running sum would round, too
        momentum.update([masters])
        naive.lerp_(masters[name].bfloat16(), 1 - m)
    moved = step * (steps - m * (1 - m**steps) / (1 - m))
    found = dict(momentum.named_parameters())[name]
    assert found.dtype == torch.float32
    assert_close(found - before, torch.full_like(before, moved), rtol=1e-4, atol=0)
    assert float((naive.float() - before - moved).abs().max()) > 0.1 * moved
