"""The published training step: the model of `published`, AdamW over all of it."""

import torch
from torch import Tensor, nn
from transformers import T5Config

from atomas.benchmarks.step.presets import Preset
from atomas.benchmarks.step.published import PaddedBatch, PublishedModel
from atomas.config import Config
from atomas.data.batching import PairBatch
from atomas.phases import phase


class PublishedStep:
    """Model and optimizer of one process."""

    def __init__(self, config: Config, preset: Preset, device: torch.device) -> None:
        """Random weights, a full queue."""
        torch.manual_seed(0)
        self.model = build_published(config, preset)
        self.model.to(device, torch.bfloat16 if config.training.precision == "bf16" else torch.float32)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = _MasterWeights(trained, config)
        self.model.train()

    def __call__(self, batch: PairBatch) -> dict[str, Tensor]:
        """One step; the losses."""
        losses: dict[str, Tensor] = self.model(
            PaddedBatch.of(batch, self.model.length, self.model.temp.dtype)
        )
        with phase("backward"):
            losses["loss"].backward()
        with phase("optimizer"):
            self.optimizer.step()
        return {name: value.detach() for name, value in losses.items()}


def build_published(config: Config, preset: Preset, *, tie_noise: float = 1e-6) -> PublishedModel:
    """The model with random weights, float32, on the CPU."""
    model = config.model
    t5 = T5Config(
        vocab_size=preset.vocabulary,
        d_model=model.d_model,
        d_kv=model.d_kv,
        d_ff=model.d_ff,
        num_layers=model.num_layers,
        num_decoder_layers=model.num_decoder_layers,
        num_heads=model.num_heads,
        dropout_rate=model.dropout_rate,
        decoder_start_token_id=0,
    )
    return PublishedModel(t5, length=preset.length, queue_size=preset.queue, tie_noise=tie_noise)


class _MasterWeights:
    """AdamW and gradient clipping; of half-precision weights it steps float32 masters, as DeepSpeed does."""

    def __init__(self, weights: list[nn.Parameter], config: Config) -> None:
        self._weights = weights
        self._masters = [nn.Parameter(w.detach().float()) if w.dtype != torch.float32 else w for w in weights]
        settings = config.optimizer
        self._clipping = settings.gradient_clipping
        self._adamw = torch.optim.AdamW(
            self._masters,
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
        )

    @torch.no_grad()
    def step(self) -> None:
        pairs = list(zip(self._weights, self._masters, strict=True))
        for weight, master in pairs:
            if master is not weight and weight.grad is not None:
                master.grad = weight.grad.float()
                weight.grad = None
        torch.nn.utils.clip_grad_norm_(self._masters, self._clipping)
        self._adamw.step()
        self._adamw.zero_grad()
        for weight, master in pairs:
            if master is not weight:
                weight.copy_(master)
