"""The whole model: parts and their ablation, padding invariance, false negatives, precision."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from atomas.config import MomentumConfig
from atomas.data.batching import PairBatch, RaggedTokens
from atomas.errors import AtomasError
from atomas.model.atomas import AtomasModel, projected_clamp
from atomas.model.momentum_encoder import Momentum

LENGTHS = ([4, 11, 2, 7], [9, 3, 5, 5])

PARTS = {
    "global_weight": {"loss/global", "recall/text_to_smiles", "recall/smiles_to_text", "temperature"},
    "hierarchical_weight": {
        "loss/hierarchical",
        "logit_scale",
        *(f"{kind}/level_{level}" for kind in ("loss", "recall") for level in range(3)),
    },
    "lm_weight": {"loss/lm"},
}


def _backward(model: AtomasModel, batch: PairBatch, *, momentum: bool = True) -> dict[str, torch.Tensor]:
    targets = Momentum(model.encoder, MomentumConfig(queue_size=6)).targets(batch) if momentum else None
    losses = model(batch, targets)
    losses["loss"].backward()
    return losses


@pytest.mark.parametrize("task", ["genmol", "gentext", "both"])
@pytest.mark.parametrize("pooling", ["position_linear", "mean", "attention"])
@pytest.mark.parametrize("momentum", [True, False])
def test_every_parameter_gets_a_gradient(
    make_model: Any, make_batch: Any, task: str, pooling: str, momentum: bool
) -> None:
    model = make_model(task=task, pooling=pooling)
    losses = _backward(model, make_batch(*LENGTHS), momentum=momentum)
    assert all(torch.isfinite(value) for value in losses.values())
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert losses["loss"].requires_grad
    assert not any(value.requires_grad for name, value in losses.items() if name != "loss")
    assert all(value.ndim == 0 for value in losses.values())
    assert all(parameter.ndim > 0 for parameter in model.parameters())


@pytest.mark.parametrize(
    "off", [{"global_weight"}, {"hierarchical_weight"}, {"lm_weight"}, {"global_weight", "lm_weight"}]
)
def test_a_part_without_weight_does_not_exist(make_model: Any, make_batch: Any, off: set[str]) -> None:
    full = _backward(make_model(), make_batch(*LENGTHS))
    model = make_model(**dict.fromkeys(off, 0.0), pooling="attention")
    losses = _backward(model, make_batch(*LENGTHS))
    assert losses.keys() == full.keys() - set().union(*(PARTS[part] for part in off))
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    names = " ".join(name for name, _ in model.named_parameters())
    assert ("pooler" not in names) == ("temperature" not in names) == ("global_weight" in off)
    assert ("alignment" not in names) == ("hierarchical_weight" in off)
    assert ("decoder" not in names) == ("lm_weight" in off)


@pytest.mark.parametrize(
    "level_weights", [(1.0, 0.0, 0.0), (0.0, 2.0, 0.0), (0.0, 0.0, 1.0), (0.5, 0.0, 3.0)]
)
def test_levels_without_weight_are_left_out(
    make_model: Any, make_batch: Any, level_weights: tuple[float, ...]
) -> None:
    model = make_model(level_weights=level_weights, global_weight=0.0, lm_weight=0.0, hierarchical_weight=2.0)
    losses = _backward(model, make_batch(*LENGTHS), momentum=False)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    levels = {level: weight for level, weight in enumerate(level_weights) if weight}
    assert {name for name in losses if name.startswith("loss/level")} == {f"loss/level_{n}" for n in levels}
    expected = sum(weight * losses[f"loss/level_{n}"] for n, weight in levels.items())
    assert_close(losses["loss/hierarchical"], expected)
    assert_close(losses["loss"].detach(), 2 * losses["loss/hierarchical"])


def test_other_numbers_of_levels(make_model: Any, make_batch: Any) -> None:
    for ratios in ((), (0.5,), (0.5, 0.5, 0.5)):
        model = make_model(ratios=ratios, level_weights=(1.0,) * (1 + len(ratios)))
        losses = _backward(model, make_batch(*LENGTHS))
        assert sum(name.startswith("loss/level") for name in losses) == 1 + len(ratios)


def test_total_is_the_weighted_sum_and_both_tasks_count_alike(make_model: Any, make_batch: Any) -> None:
    batch = make_batch(*LENGTHS)
    losses = _backward(
        make_model(task="both", global_weight=2.0, hierarchical_weight=3.0, lm_weight=5.0), batch
    )
    total = 2 * losses["loss/global"] + 3 * losses["loss/hierarchical"] + 5 * losses["loss/lm"]
    assert_close(losses["loss"].detach(), total)
    assert_close(losses["loss/lm"], (losses["loss/genmol"] + losses["loss/gentext"]) / 2)
    assert_close(_backward(make_model(task="genmol"), batch)["loss/lm"], losses["loss/genmol"])
    # A caption begins with another token where the decoder also writes SMILES.
    assert_close(
        _backward(make_model(task="gentext"), batch)["loss/lm"], losses["loss/gentext"], rtol=0.05, atol=0
    )


def test_no_part_at_all_is_an_error(make_model: Any) -> None:
    with pytest.raises(AtomasError, match=r"loss\.level_weights"):
        make_model(global_weight=0.0, lm_weight=0.0, level_weights=(0.0, 0.0, 0.0))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 31), min_size=0, max_size=6),
    own=st.integers(1, 31),
    place=st.integers(0, 6),
    seed=st.integers(0, 1000),
)
def test_a_sample_does_not_depend_on_its_company(
    make_model: Any, make_tokens: Any, lengths: list[int], own: int, place: int, seed: int
) -> None:
    """Padding invariance: features, levels and clusters alone and among others."""
    model = make_model(pooling="position_linear", token_budget=100).eval()
    place = min(place, len(lengths))
    alone = make_tokens([own], seed=seed)
    others = make_tokens(lengths, seed=seed + 1)
    rows = list(others.ids.split(others.lengths.tolist()))
    rows.insert(place, alone.ids)
    together = RaggedTokens.from_lists([row.tolist() for row in rows])

    one, many = model.embed(alone, "text"), model.embed(together, "text")
    assert_close(many.features[place], one.features[0], rtol=1e-4, atol=1e-6)
    for level, (expected, found) in enumerate(zip(one.levels, many.levels, strict=True)):
        assert found.lengths[place] == expected.lengths[0]
        pick = slice(int(found.lengths[:place].sum()), int(found.lengths[: place + 1].sum()))
        assert_close(found.tokens[pick], expected.tokens, rtol=1e-4, atol=1e-5)
        assert_close(found.weight[pick], expected.weight, rtol=1e-4, atol=1e-6)
        if level:
            below = many.levels[level - 1].lengths
            pick = slice(int(below[:place].sum()), int(below[: place + 1].sum()))
            assert found.assignment[pick].tolist() == expected.assignment.tolist()


def test_losses_do_not_depend_on_the_token_budget(make_model: Any, make_batch: Any) -> None:
    results = [
        _backward(make_model(task="both", token_budget=budget), make_batch(*LENGTHS))
        for budget in (1, 25, 1000)
    ]
    for name, value in results[0].items():
        for other in results[1:]:
            assert_close(other[name], value, rtol=1e-4, atol=1e-5)


def test_equal_texts_or_molecules_are_no_negatives(make_model: Any, make_batch: Any) -> None:
    batch = make_batch(*LENGTHS)
    doubled = replace(batch, text_id=torch.tensor([0, 1, 0, 3]), molecule_id=torch.tensor([0, 1, 2, 1]))
    masked, kept = make_model(false_negatives="mask"), make_model(false_negatives="keep")
    plain = _backward(kept, batch)
    assert_close(_backward(masked, batch)["loss"], plain["loss"])
    assert_close(_backward(kept, doubled)["loss"], plain["loss"])
    fewer = _backward(masked, doubled)
    for name in ("loss/global", "loss/level_0", "loss/level_1", "loss/level_2"):
        assert fewer[name] < plain[name]


def test_a_queued_pair_with_the_same_text_is_no_negative(make_model: Any, make_batch: Any) -> None:
    model = make_model(global_weight=1.0, hierarchical_weight=0.0, lm_weight=0.0)
    batch, past = make_batch(*LENGTHS), make_batch(*LENGTHS, seed=1)
    past = replace(past, text_id=past.text_id + 100, molecule_id=past.molecule_id + 100)
    same = replace(past, molecule_id=batch.molecule_id)

    def loss(queued: PairBatch | None) -> torch.Tensor:
        momentum = Momentum(model.encoder, MomentumConfig(queue_size=8))
        if queued is not None:
            momentum.enqueue(momentum.targets(queued))
        value: torch.Tensor = model(batch, momentum.targets(batch))["loss/global"]
        return value

    # Every molecule of `same` is left out for one text each: between an empty queue and one of strangers.
    assert loss(None) < loss(same) < loss(past)


def test_a_batch_of_one(make_model: Any, make_batch: Any) -> None:
    losses = _backward(make_model(), make_batch([5], [1]))
    assert losses["loss/hierarchical"] == 0
    assert torch.isfinite(losses["loss"])


@pytest.mark.parametrize("cast_weights", [True, False])
def test_bf16_is_near_float32(make_model: Any, make_batch: Any, cast_weights: bool) -> None:
    batch, expected = make_batch(*LENGTHS), make_model(task="both")
    reference = _backward(expected, batch)
    model = make_model(task="both")
    if cast_weights:
        losses = _backward(model.to(torch.bfloat16), batch)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            targets = Momentum(model.encoder, MomentumConfig(queue_size=6), autocast=torch.bfloat16).targets(
                batch
            )
            losses = model(batch, targets)
        losses["loss"].backward()
    assert all(value.dtype == torch.float32 for value in losses.values())
    for name, value in reference.items():
        if name.startswith("loss"):
            assert_close(losses[name], value, rtol=0.1, atol=0.1)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_reranking_scores_are_those_of_the_loss(make_model: Any, make_batch: Any) -> None:
    model = make_model(level_weights=(1.0, 0.0, 3.0)).eval()
    batch = make_batch(*LENGTHS)
    text, smiles = model.embed(batch.text, "text"), model.embed(batch.smiles, "smiles")
    scores = model.rerank_scores(text, smiles)
    part = model.rerank_scores(
        model.embed(batch.text, "text"),
        model.embed(RaggedTokens(ids=batch.smiles.ids[:9], lengths=batch.smiles.lengths[:1]), "smiles"),
    )
    assert scores.shape == (4, 4)
    assert_close(part, scores[:, :1], rtol=1e-4, atol=1e-5)
    assert scores.abs().max() <= 1 + 1e-5  # a weighted mean of cosines
    with pytest.raises(AtomasError, match="hierarchical_weight"):
        make_model(hierarchical_weight=0.0).rerank_scores(text, smiles)


def test_the_same_seed_gives_the_same_losses(make_model: Any, make_batch: Any) -> None:
    first, second = (_backward(make_model(dropout_rate=0.3).train(), make_batch(*LENGTHS)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_projected_clamp_lets_the_value_return() -> None:
    value = torch.tensor([-1.0, 0.5, 2.0, -1.0, 2.0], requires_grad=True)
    clamped = projected_clamp(value, 0.0, 1.0)
    assert clamped.tolist() == [0.0, 0.5, 1.0, 0.0, 1.0]
    (clamped * torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0])).sum().backward()
    assert value.grad is not None
    assert value.grad.tolist() == [0.0, 1.0, 0.0, -1.0, 1.0]


def test_a_decoder_of_both_sees_what_it_writes(make_model: Any, make_batch: Any) -> None:
    batch = make_batch([4, 3], [2, 5])
    firsts: dict[str, list[int]] = {}
    for task in ("genmol", "gentext", "both"):
        model = make_model(task=task, global_weight=0.0, hierarchical_weight=0.0)
        read: list[torch.Tensor] = []
        embedding = model.encoder.backbone.t5.decoder.embed_tokens
        embedding.register_forward_pre_hook(lambda _, inputs, read=read: read.append(inputs[0]))
        model(batch)
        written = [ids for ids in read if len(ids) != 14]  # not the pass of the encoder over both sides
        firsts[task] = [int(ids[0]) for ids in written]
    assert firsts == {"genmol": [0], "gentext": [0], "both": [0, 1]}
