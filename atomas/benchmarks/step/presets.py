"""The models that are measured."""

from dataclasses import dataclass

from atomas.config import (
    Config,
    DataConfig,
    DeepSpeedConfig,
    LossConfig,
    ModelConfig,
    MomentumConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)

PUBLISHED_LENGTH = 512
VOCABULARY = 32_128
"""T5's 32,100 pieces, rounded up to a multiple of 128."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A T5, and the sizes around it."""

    d_model: int
    d_kv: int
    d_ff: int
    layers: int
    """of the encoder, and of the decoder"""
    heads: int
    vocabulary: int = VOCABULARY
    queue: int = 13_200
    length: int = PUBLISHED_LENGTH
    """N: what the published form pads to, and the longest sequence that is drawn"""

    def config(
        self, *, batch_size: int, device: str, dropout: float, threads: int, world_size: int = 1
    ) -> Config:
        """The configuration of a run of such a model: the losses and weights of the published one.

        On CUDA bf16 with fp32 masters, elsewhere fp32. On one rank there is nothing that ZeRO could share.
        """
        return Config(
            run=RunConfig(device="cuda" if device == "cuda" else "cpu", threads=threads),
            data=DataConfig(
                batch_size=batch_size, max_text_tokens=self.length, max_smiles_tokens=self.length
            ),
            model=ModelConfig(
                d_model=self.d_model,
                d_kv=self.d_kv,
                d_ff=self.d_ff,
                num_layers=self.layers,
                num_decoder_layers=self.layers,
                num_heads=self.heads,
                dropout_rate=dropout,
                pooling="position_linear",
            ),
            loss=LossConfig(false_negatives="keep"),
            momentum=MomentumConfig(queue_size=self.queue),
            optimizer=OptimizerConfig(learning_rate=1e-4),
            training=TrainingConfig(precision="bf16" if device == "cuda" else "fp32"),
            deepspeed=DeepSpeedConfig(zero_stage=0 if world_size == 1 and device != "cuda" else 2),
        )


PRESETS = {
    "cpu-small": Preset(d_model=256, d_kv=32, d_ff=1024, layers=4, heads=8),
    "t5-small": Preset(d_model=512, d_kv=64, d_ff=2048, layers=6, heads=8),
    "molt5-base": Preset(d_model=768, d_kv=64, d_ff=3072, layers=12, heads=12),
    "molt5-large": Preset(d_model=1024, d_kv=64, d_ff=4096, layers=24, heads=16),
}
