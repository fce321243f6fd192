"""Our step as `atomas train` makes it: the same engine, optimizer and momentum, on one batch after the other."""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atomas.benchmarks.step.presets import Preset
from atomas.benchmarks.step.switches import SWITCHES, change_process
from atomas.config import Config
from atomas.data.batching import PairBatch
from atomas.model.atomas import AtomasModel
from atomas.model.momentum import FeatureQueue
from atomas.model.momentum_encoder import Momentum
from atomas.phases import phase
from atomas.training.engine import build_engine
from atomas.training.shards import OptimizerShard
from atomas.training.step import contrastive_step


class OurStep:
    """Model, optimizer and momentum of one rank, inside a process group."""

    def __init__(
        self, config: Config, preset: Preset, device: torch.device, world_size: int, off: tuple[str, ...] = ()
    ) -> None:
        """Random weights, a full queue; what `off` names of SWITCHES is switched off in this process."""
        change_process(off)
        torch.manual_seed(0)
        model = build_model(config, preset)
        for name in off:
            if change := SWITCHES[name].model:
                change(model, preset)
        if config.training.compile:
            model.encoder.backbone.compile_blocks()
        model.to(device)
        autocast = torch.bfloat16 if config.training.precision == "bf16" else None
        self.momentum = Momentum(model.encoder, config.momentum, autocast=autocast).to(device)
        fill(self.momentum.queue)
        self.engine = build_engine(config, model, world_size)
        self.shard = OptimizerShard(self.engine)
        self.momentum.shard(
            self.shard.fragments,
            self.shard.masters_by_part(),
            replicated=self.shard.replicated,
            layerwise=False,
        )
        for name in off:
            if change_optimizer := SWITCHES[name].optimizer:
                change_optimizer(self.engine.basic_optimizer)
        self.engine.train()

    def __call__(self, batch: PairBatch) -> dict[str, Tensor]:
        """One step; the losses."""
        self.momentum.update(self.shard.masters_by_part())
        losses = contrastive_step(self.engine, self.momentum, batch, autocast=contextlib.nullcontext)
        with phase("optimizer"):
            self.engine.step()
        return losses


def build_model(config: Config, preset: Preset) -> AtomasModel:
    """The model with random weights, float32, on the CPU."""
    return AtomasModel(
        config.model,
        config.loss,
        vocab_size=preset.vocabulary,
        token_budget=config.data.token_budget,
        max_text_tokens=preset.length,
        max_smiles_tokens=preset.length,
    )


def fill(queue: FeatureQueue, features: dict[str, Any] | None = None) -> None:
    """As full as it is after some thousand pairs; with random features, or with `features` [Q, D] by modality."""
    size, width = queue.text.shape
    for modality in ("text", "smiles"):
        given = F.normalize(torch.randn(size, width), dim=1) if features is None else features[modality]
        getattr(queue, modality).copy_(given)
    queue.filled = size
