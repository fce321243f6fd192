"""Gradient caching on one rank: with dropout, and what it asks of the configuration."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from atomas.config import Config, DataConfig, TrainingConfig
from atomas.data.batching import PairBatch
from atomas.errors import AtomasError
from atomas.model.alignment import Level
from atomas.model.atomas import AtomasModel, Representation
from atomas.model.global_batch import GlobalBatch
from atomas.training.step import contrastive_step, micro_batches_of, seeded
from tests.model.test_ranks import PAIRS, Case, PlainEngine, _batch, _model
from tests.training.conftest import Trainer, last_record

CPU = torch.device("cpu")


def _level(levels: list[Level]) -> Level:
    return Level(
        tokens=torch.cat([level.tokens for level in levels]),
        lengths=torch.cat([level.lengths for level in levels]),
        weight=torch.cat([level.weight for level in levels if level.weight is not None]),
        assignment=None,
    )


def _joined(parts: list[Representation]) -> Representation:
    """The micro-batches' representations as that of one batch, with their graphs."""
    modalities = parts[0].features
    return Representation(
        text_states=torch.cat([part.text_states for part in parts]),
        smiles_states=torch.cat([part.smiles_states for part in parts]),
        features={m: torch.cat([part.features[m] for part in parts]) for m in modalities},
        levels={
            m: [_level([part.levels[m][n] for part in parts]) for n in range(len(parts[0].levels[m]))]
            for m in modalities
        },
    )


def _in_one_graph(model: AtomasModel, batch: PairBatch, count: int) -> Tensor:
    """The loss with the random numbers that gradient caching draws."""
    seeds = torch.randint(2**62, (count,)).tolist()
    everyone = GlobalBatch.of(batch)
    found, generated = [], []
    for seed, micro_batch in zip(seeds, batch.split(count), strict=True):
        with seeded(seed, CPU):
            found.append(model.represent(micro_batch))
            generated.append(model._generation(micro_batch, found[-1], everyone)["loss/lm"])
    parts = model._contrast(_joined(found), None, everyone) | {"loss/lm": torch.stack(generated).sum()}
    return model.total(parts)


def _dropping(dtype: torch.dtype) -> AtomasModel:
    model = _model(Case(dtype=dtype)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
        elif hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.3
    return model


def test_both_passes_drop_the_same() -> None:
    batch = _batch(0, slice(0, PAIRS))
    model = _dropping(torch.float64)
    torch.manual_seed(5)
    expected = _in_one_graph(model, batch, 3)
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    torch.manual_seed(5)
    losses = contrastive_step(PlainEngine(model, 3), None, batch, micro_batches=3)
    assert_close(losses["loss"], expected.detach(), rtol=1e-12, atol=1e-12)
    for name, parameter in model.named_parameters():
        assert_close(
            parameter.grad, gradients[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )
    other = contrastive_step(PlainEngine(model, 3), None, batch, micro_batches=3)
    assert other["loss"] != losses["loss"]  # other random numbers: dropout is on, and the stream goes on


@pytest.mark.parametrize("alone", ["global_weight", "hierarchical_weight", "lm_weight"])
def test_one_loss_alone(alone: str) -> None:
    weights = dict.fromkeys(("global_weight", "hierarchical_weight", "lm_weight"), 0.0) | {alone: 1.0}
    model, batch = _model(Case(), **weights), _batch(0, slice(0, PAIRS))
    expected = contrastive_step(PlainEngine(model, 1), None, batch)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    losses = contrastive_step(PlainEngine(model, 3), None, batch, micro_batches=3)
    assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-12)


def test_the_micro_batch_must_divide_a_ranks_pairs() -> None:
    def config(size: int) -> Config:
        return Config(data=DataConfig(batch_size=24), training=TrainingConfig(micro_batch_size=size))

    assert [micro_batches_of(config(size), 2) for size in (0, 12, 100, 4, 1)] == [1, 1, 1, 3, 12]
    with pytest.raises(AtomasError, match=r"micro_batch_size = 5 .* 12 pairs .* use 1, 2, 3, 4, 6, 12"):
        micro_batches_of(config(5), 2)


def test_too_few_pairs_for_the_micro_batches() -> None:
    engine: Any = PlainEngine(_model(Case()), 4)
    with pytest.raises(AtomasError, match="2 pairs of a rank are too few for 4"):
        contrastive_step(engine, None, _batch(0, slice(0, 2)), micro_batches=4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_in_micro_batches_is_the_same_run(train: Trainer, tmp_path: Path, stage: int) -> None:
    common = (
        "--training.max_steps=4",
        "--training.gradient_accumulation_steps=2",
        "--model.dropout_rate=0",
        f"--deepspeed.zero_stage={stage}",
    )
    train("whole", *common)
    train("cut", *common, "--training.micro_batch_size=2", "--training.feature_cache=disk")
    whole, cut = (last_record(tmp_path / "runs" / name) for name in ("whole", "cut"))
    for key in ("loss", "gradient_norm", "temperature", "logit_scale"):
        assert cut[key] == pytest.approx(whole[key], rel=1e-4), key
