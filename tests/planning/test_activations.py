"""Activations on paper are what autograd keeps for the backward pass, part by part."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from atomas.config import Config, ModelConfig, TrainingConfig
from atomas.data.batching import PairBatch, RaggedTokens
from atomas.planning.memory import plan_memory
from atomas.planning.sizes import T5Sizes
from atomas.planning.workload import PairLengths, Workload
from atomas.training.model_files import build_model

TEXT, SMILES, PAIRS, VOCABULARY = 50, 30, 8, 1000


def _tokens(length: int) -> RaggedTokens:
    return RaggedTokens.from_lists([[*range(3, length + 2), 1]] * PAIRS)


def _kept(run: Callable[[], Any], known: set[int]) -> tuple[int, Any]:
    """Bytes of storages that autograd saves while `run` runs, without those `known`, and its result."""
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(storage.nbytes() for storage in storages.values()), result


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "model",
    [
        {},
        {"dropout_rate": 0.0},
        {"feed_forward": "gated-gelu"},
        {"feed_forward": "gated-gelu", "dropout_rate": 0.0},
    ],
)
def test_activations_are_what_autograd_keeps(precision: Any, model: dict[str, Any]) -> None:
    sizes = {"d_model": 64, "d_kv": 20, "d_ff": 200, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    config = Config(model=ModelConfig(**(sizes | model)), training=TrainingConfig(precision=precision))
    built = build_model(config, VOCABULARY).to(torch.float32 if precision == "fp32" else torch.bfloat16)
    text, smiles, numbers = _tokens(TEXT), _tokens(SMILES), torch.arange(PAIRS)
    batch = PairBatch(text=text, smiles=smiles, molecule_id=numbers, text_id=numbers, sample_id=numbers)
    known = {parameter.untyped_storage().data_ptr() for parameter in built.parameters()}
    assert built.alignment is not None
    alignment, encoder = built.alignment, built.encoder

    of_encoder, states = _kept(lambda: encoder.states(batch), known)
    known.add(states[0].untyped_storage().data_ptr())  # the plan counts them with the encoder
    of_encoder += states[0].untyped_storage().nbytes()
    of_heads, _ = _kept(
        lambda: (alignment.text(states[0], text.lengths), alignment.smiles(states[1], smiles.lengths)), known
    )
    of_decoder, _ = _kept(
        lambda: encoder.backbone.language_model_loss(states[0], text.lengths, smiles), known
    )

    work = Workload(
        config, T5Sizes.of_model(config.model, VOCABULARY), PairLengths.equal(TEXT, SMILES), PAIRS
    )
    planned = {c.name: c.bytes for c in plan_memory(work, 0, "cpu").components if c.moment == "graph"}
    assert planned["encoder"] == pytest.approx(of_encoder, rel=0.05)
    assert planned["heads"] == pytest.approx(of_heads, rel=0.05)
    head = planned["gradients of the output layer"]
    assert planned["decoder"] + head == pytest.approx(of_decoder, rel=0.05)
