"""The part of a checkpoint that is enough to use the model: fp32 weights, configuration, tokenizer.

model/config.yaml           the run's configuration
      backbone.json         the T5 configuration, so that no pretrained checkpoint is needed again
      model.safetensors     weights by parameter name
      momentum.safetensors  the momentum copy's, where there is one
      tokenizer/            tokenizer.json
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import T5Config

from atomas.config import Config
from atomas.config_file import dump_config, load_config
from atomas.data.tokenizer import AtomasTokenizer
from atomas.errors import AtomasError
from atomas.model.atomas import AtomasModel
from atomas.model.backbone import t5_from_config
from atomas.training.tensor_files import write_tensors


def build_model(config: Config, vocab_size: int, *, t5: Any = None) -> AtomasModel:
    """The model that a configuration describes; `t5` takes the place of the backbone it names."""
    return AtomasModel(
        config.model,
        config.loss,
        vocab_size=vocab_size,
        token_budget=config.data.token_budget,
        max_text_tokens=config.data.max_text_tokens,
        max_smiles_tokens=config.data.max_smiles_tokens,
        t5=t5,
    )


def write_model(
    folder: Path,
    config: Config,
    t5_config: Any,
    weights: Mapping[str, Tensor],
    momentum: Mapping[str, Tensor] | None,
    tokenizer: AtomasTokenizer,
) -> None:
    """Write the `model/` folder of a checkpoint. Weights are stored in fp32 on the host."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    (folder / "backbone.json").write_text(json.dumps(t5_config.to_dict(), indent=1) + "\n", encoding="utf-8")
    write_tensors(folder / "model.safetensors", _plain(weights))
    if momentum is not None:
        write_tensors(folder / "momentum.safetensors", _plain(momentum))
    tokenizer.save(folder / "tokenizer")


def read_model(checkpoint: Path, *, momentum: bool = False) -> tuple[AtomasModel, AtomasTokenizer, Config]:
    """The model of a checkpoint on the CPU, in evaluation mode.

    Args:
        checkpoint: a published checkpoint's folder.
        momentum: put the momentum copy's weights in place of the online ones, where it has them.

    Raises:
        AtomasError: a file is missing or broken, or its weights do not fit the configuration.
    """
    folder = checkpoint / "model"
    try:
        config = load_config(folder / "config.yaml")
        tokenizer = AtomasTokenizer.load(folder / "tokenizer")
        t5_config = T5Config(**json.loads((folder / "backbone.json").read_text(encoding="utf-8")))
        weights = load_file(folder / "model.safetensors")
        if momentum:
            if not (folder / "momentum.safetensors").is_file():
                raise AtomasError(
                    f"{checkpoint} has no momentum weights: it was trained with momentum.enabled = false"
                )
            weights |= load_file(folder / "momentum.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise AtomasError(f"checkpoint {checkpoint} cannot be read: {error}") from None
    t5 = t5_from_config(
        t5_config, decoder=config.loss.lm_weight > 0, tied="encoder.backbone.t5.lm_head.weight" not in weights
    )
    model = build_model(config, tokenizer.vocab_size, t5=t5)
    load_weights(model, weights, source=str(folder))
    return model.eval(), tokenizer, config


@torch.no_grad()
def load_weights(module: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Copy weights into parameters of the same names.

    Raises:
        AtomasError: a parameter has no weight of its name and shape.
    """
    for name, parameter in module.named_parameters():
        if name not in weights:
            raise AtomasError(f"{source}: no weight named {name}; the checkpoint is of another model")
        if weights[name].shape != parameter.shape:
            raise AtomasError(
                f"{source}: {name} has shape {tuple(weights[name].shape)}, the model wants {tuple(parameter.shape)}"
            )
        parameter.copy_(weights[name])


def _plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()}
