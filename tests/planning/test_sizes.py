"""Parameters on paper are those of the model that is built."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from atomas.config import Config, LossConfig, ModelConfig
from atomas.errors import AtomasError
from atomas.planning.sizes import T5Sizes, count_parameters
from atomas.training.model_files import build_model

SIZES: dict[str, Any] = {
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 20,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
}


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        ({}, {}),
        ({"feed_forward": "gated-gelu", "tie_word_embeddings": False}, {}),
        ({"pooling": "position_linear"}, {"lm_weight": 0.0}),
        ({"pooling": "attention", "ratios": (0.25,)}, {"level_weights": (0.0, 1.0)}),
        ({"tie_word_embeddings": False}, {"hierarchical_weight": 0.0, "lm_weight": 0.0}),
        ({"pooling": "attention"}, {"global_weight": 0.0}),
    ],
)
def test_parameters_are_those_of_the_model(model: dict[str, Any], loss: dict[str, Any]) -> None:
    config = Config(model=ModelConfig(**SIZES, **model), loss=LossConfig(**loss))
    counts = count_parameters(config, T5Sizes.of_model(config.model, 50))
    with torch.device("meta"):
        built = build_model(config, 50)
    assert counts.total == sum(parameter.numel() for parameter in built.parameters())
    assert counts.slow == sum(parameter.numel() for parameter in built.encoder.parameters())


def test_sizes_of_a_pretrained_folder(tmp_path: Path) -> None:
    config = {"d_model": 8, "d_kv": 2, "d_ff": 12, "num_layers": 3, "num_heads": 4, "vocab_size": 60}
    (tmp_path / "config.json").write_text(json.dumps({**config, "feed_forward_proj": "gated-gelu"}))
    t5 = T5Sizes.of_model(ModelConfig(pretrained=str(tmp_path)), 50)
    assert (t5.backbone.inner, t5.backbone.decoder_layers, t5.backbone.vocabulary) == (8, 3, 60)
    assert t5.backbone.gated
    assert t5.tied
    with pytest.raises(AtomasError, match="no T5"):
        T5Sizes.of_model(ModelConfig(pretrained=str(tmp_path / "none")), 50)
