"""Counted FLOPs beside torch's own counter, which sees the products that run."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from atomas.config import Config, LossConfig, ModelConfig, MomentumConfig
from atomas.model.atomas import AtomasModel
from atomas.model.flops import BackboneSizes, PartFlops, StepFlops, cluster_counts, count_step_flops
from atomas.model.momentum_encoder import Momentum
from atomas_kernels import dpc_knn, set_backend

TEXT, SMILES = [14, 11, 20, 17], [9, 13, 5, 16]
SIZES = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}

_PER_SCORE = 2 * 4 * SIZES["num_heads"] * SIZES["d_kv"]  # two layers, two products of 2 I each
CROSS_SCORES = _PER_SCORE * sum(n * m for n, m in zip(TEXT, SMILES, strict=True))
UNREAD_SCORES = _PER_SCORE * sum(m * (m - 1) // 2 for m in SMILES)


@pytest.fixture(autouse=True)
def reference() -> Iterator[None]:
    """The backend whose products the counter sees."""
    set_backend("reference")
    yield
    set_backend("auto")


def counted(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def expected(
    model: AtomasModel,
    *,
    queue: int = 0,
    filled: int | None = None,
    loss: LossConfig | None = None,
    **keys: Any,
) -> StepFlops:
    config = Config(
        model=ModelConfig(**{**SIZES, **keys}),
        loss=loss or LossConfig(),
        momentum=MomentumConfig(enabled=queue > 0, queue_size=queue),
    )
    sizes = BackboneSizes.of_t5(model.encoder.backbone.t5.config)
    assert sizes == BackboneSizes.of_model(config.model, sizes.vocabulary)
    return count_step_flops(config, sizes, TEXT, SMILES, queue=queue if filled is None else filled)


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_backbone_as_torch_counts_it(make_model: Any, make_batch: Any, feed_forward: str) -> None:
    """The counter misses attention without a mask on the CPU, counts causal scores that nobody reads, and one of the
    output layer's two gradients is added in place, which it does not see either.
    """
    model, batch = make_model(feed_forward=feed_forward, token_budget=512), make_batch(TEXT, SMILES)
    flops, backbone = expected(model, feed_forward=feed_forward), model.encoder.backbone
    assert counted(lambda: model.encoder.states(batch)) == flops.encoder.forward
    step = counted(lambda: torch.cat(model.encoder.states(batch)).sum().backward())
    assert step == flops.encoder.forward + flops.encoder.backward

    states = torch.randn(sum(TEXT), backbone.width)
    decoded = counted(lambda: backbone.decode(states, batch.text.lengths, batch.smiles))
    assert decoded == flops.decoder.forward - CROSS_SCORES + UNREAD_SCORES
    hidden = torch.randn(sum(SMILES), backbone.width, requires_grad=True)
    head = counted(lambda: backbone.t5.lm_head(hidden, batch.smiles.ids).backward())
    assert head == flops.lm_loss.forward + flops.lm_loss.backward


def test_levels_as_torch_counts_them(make_model: Any, make_batch: Any) -> None:
    model, batch = make_model(), make_batch(TEXT, SMILES)
    flops = expected(model)
    levels = flops.polymerisation + flops.importance
    states = [torch.randn(sum(lengths), 16, requires_grad=True) for lengths in (TEXT, SMILES)]

    def hierarchy() -> None:
        both = [
            *model.alignment.text(states[0], batch.text.lengths),
            *model.alignment.smiles(states[1], batch.smiles.lengths),
        ]
        torch.stack([level.tokens.sum() + level.weight.square().sum() for level in both]).sum().backward()

    assert counted(hierarchy) == levels.forward + levels.backward


def test_a_step_as_torch_counts_it(make_model: Any, make_batch: Any) -> None:
    """Beside the blind spots of the backbone, the counter sees the similarities of the recall, which are no loss."""
    model, batch = make_model(token_budget=512), make_batch(TEXT, SMILES)
    momentum = Momentum(model.encoder, MomentumConfig(queue_size=6))
    targets = momentum.targets(batch)
    flops = expected(model, queue=6, filled=0)
    step = counted(lambda: model(batch, targets)["loss"].backward())
    recall = 2 * 2 * len(TEXT) ** 2 * 16
    hidden = 3 * (UNREAD_SCORES - CROSS_SCORES) + recall
    assert step == flops.hardware - flops.momentum.forward + hidden
    without_graph = counted(lambda: momentum.targets(batch))  # attention takes the way that is not seen
    assert without_graph == flops.momentum.forward - _PER_SCORE * sum(n**2 for n in TEXT + SMILES)


def test_parts_follow_the_configuration(make_model: Any) -> None:
    model = make_model()
    full = expected(model, queue=6)
    assert full.momentum == PartFlops(forward=full.encoder.forward)
    assert full.hardware - full.model == full.interaction.redundant
    assert full.total.forward > 0

    without = expected(model)
    assert without.momentum == PartFlops()
    assert without.contrastive.backward == 2 * without.contrastive.forward
    assert expected(model, loss=LossConfig(lm_weight=0)).lm_loss == PartFlops()
    bare = expected(model, loss=LossConfig(hierarchical_weight=0, global_weight=0))
    assert bare == StepFlops(encoder=bare.encoder, decoder=bare.decoder, lm_loss=bare.lm_loss)
    tokens_only = expected(model, loss=LossConfig(level_weights=(1.0, 0.0, 0.0)))
    assert tokens_only.polymerisation == PartFlops()
    assert 0 < tokens_only.importance.forward < full.importance.forward

    both = [expected(model, loss=LossConfig(task=task)) for task in ("genmol", "gentext", "both")]  # type: ignore[arg-type]
    assert both[0].decoder + both[1].decoder == both[2].decoder
    assert both[0].lm_loss.forward + both[1].lm_loss.forward == both[2].lm_loss.forward


def test_recomputation_counts_for_the_hardware_only(make_model: Any) -> None:
    model = make_model()
    kept, recomputed = expected(model), expected(model, activation_checkpointing=True)
    assert recomputed.model == kept.model
    assert recomputed.hardware - kept.hardware == kept.encoder.forward + kept.decoder.forward

    sizes = BackboneSizes.of_model(ModelConfig(), 100)
    once, twice = (
        count_step_flops(Config(), sizes, TEXT, SMILES, encoded_twice=cached, scored_twice=cached)
        for cached in (False, True)
    )
    assert twice.model == once.model
    again = once.encoder + once.polymerisation + once.importance + once.interaction
    assert twice.hardware - once.hardware == again.forward


def test_a_batch_over_ranks_is_the_batch(make_model: Any) -> None:
    """Encoder and decoder add up over ranks; interaction and contrast grow with the global batch."""
    config, sizes = Config(), BackboneSizes.of_model(ModelConfig(), 100)
    whole = count_step_flops(config, sizes, TEXT, SMILES)
    halves = [count_step_flops(config, sizes, TEXT[part], SMILES[part]) for part in (slice(2), slice(2, 4))]
    assert (halves[0] + halves[1]).decoder == whole.decoder
    assert (halves[0] + halves[1]).interaction.forward < whole.interaction.forward
    assert (halves[0] + halves[1]).contrastive.forward * 2 == whole.contrastive.forward


@pytest.mark.parametrize("ratio", [0.07, 0.25, 0.5, 1.0])
def test_cluster_counts_are_those_of_the_clustering(ratio: float) -> None:
    lengths = torch.arange(1, 101)
    _, counts = dpc_knn(torch.randn(int(lengths.sum()), 2), lengths, ratio=ratio, k=2)
    assert cluster_counts(lengths.numpy(), ratio).tolist() == counts.tolist()
