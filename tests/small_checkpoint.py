"""A checkpoint with random weights, in a fraction of a second."""

from pathlib import Path
from typing import Any

import torch

from atomas.config import Config, DataConfig, LossConfig, ModelConfig, MomentumConfig
from atomas.data.tokenizer import AtomasTokenizer
from atomas.training.export import write_checkpoint
from atomas.training.model_files import build_model

SENTENCES = [
    "The molecule is a chlorobenzene.",
    "A ring with two hydroxy groups {at} positions 1 and 3; it has a role as a metabolite.",
    "F/C=C\\F",
]


def write_small(
    out: Path, *, tied: bool = True, feed_forward: Any = "relu", max_tokens: int = 64, **loss: Any
) -> None:
    """Make `out` a checkpoint; `loss` are keys of LossConfig."""
    torch.manual_seed(0)
    tokenizer = AtomasTokenizer.train(SENTENCES * 4, 400)
    config = Config(
        data=DataConfig(max_text_tokens=max_tokens, max_smiles_tokens=max_tokens),
        model=ModelConfig(
            d_model=16, d_kv=4, d_ff=24, num_layers=1, num_decoder_layers=1, num_heads=2, feed_forward=feed_forward,
            tie_word_embeddings=tied, dropout_rate=0.0, pooling="position_linear",
        ),
        loss=LossConfig(**loss),
        momentum=MomentumConfig(enabled=False),
    )  # fmt: skip
    model = build_model(config, tokenizer.vocab_size)
    weights = dict(model.named_parameters())
    write_checkpoint(out, config, model.encoder.backbone.t5.config, weights, tokenizer)
