"""Some full training steps of the model, against those of the published implementation."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import T5Config

from atomas.config import LossConfig, ModelConfig, MomentumConfig
from atomas.data.batching import PairBatch, RaggedTokens
from atomas.errors import AtomasError
from atomas.model.atomas import AtomasModel
from atomas.model.authors import AuthorsState, number_of_levels
from atomas.model.backbone import t5_from_config
from atomas.model.momentum_encoder import Momentum
from atomas.verification.golden import Check, GoldenFile, compare, flat

Task = Literal["genmol", "gentext"]

TASKS: tuple[Task, ...] = ("genmol", "gentext")
LOSSES = {"L_ga": "loss/global", "L_lm": "loss/lm", "L_haa": "loss/hierarchical", "total": "loss"}
LEARNING_RATE = 1e-3
RATIOS = (0.25, 0.5)


def verify_training(golden: GoldenFile, t5_config: Path) -> Iterator[Check]:
    """Losses of every step, gradients of the first, and state after the last, of each task in the file."""
    tasks = [task for task in TASKS if golden.under(f"{task}.init")]
    if not tasks:
        raise AtomasError(f"{golden.path} has the initial state of no task ({' or '.join(TASKS)})")
    for task in tasks:
        yield from _verify_task(golden, task, t5_config)


def _verify_task(golden: GoldenFile, task: Task, t5_config: Path) -> Iterator[Check]:
    init = golden.under(f"{task}.init")
    state = AuthorsState.translate(init)
    batch = _batch(golden)
    expected = golden[f"{task}.losses"]
    if expected.ndim != 2 or expected.shape[1] != len(LOSSES):
        raise AtomasError(f"{golden.path}: {task}.losses has shape {list(expected.shape)}, not [steps, 4]")
    model = _build_model(state, number_of_levels(init), task, t5_config).to(golden.dtype)
    _load(model, state.model)
    momentum = Momentum(model.encoder, MomentumConfig(queue_size=len(_tensor(state.queue, "text"))))
    _load(momentum, state.momentum)
    state.fill(momentum.queue)

    model.eval()  # recorded without dropout
    parameters = dict(model.named_parameters(remove_duplicate=False))
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for step, losses in enumerate(expected):
        momentum.update([parameters])
        targets = momentum.targets(batch)
        values = model(batch, targets)
        optimizer.zero_grad()
        values["loss"].backward()
        momentum.enqueue(targets)
        if step == 0:
            yield from _verify_gradients(golden, task, parameters)
        optimizer.step()
        for column, (symbol, name) in enumerate(LOSSES.items()):
            tensor = f"{task}.losses[{step}, {column}]"
            yield compare(f"{task}: {symbol}", tensor, "loss", values[name], losses[column])
    yield from _verify_state(golden, f"{task}.after{len(expected)}", parameters, momentum)


def _verify_gradients(
    golden: GoldenFile, task: Task, parameters: Mapping[str, nn.Parameter]
) -> Iterator[Check]:
    for name, value in golden.under(f"{task}.grad").items():
        for ours, expected in AuthorsState.translate({name: value}).model.items():
            parameter = _tensor(parameters, ours)
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            quantity = f"{task}: gradient of {_part(ours)}"
            yield compare(quantity, f"{task}.grad.{name}", "gradient", gradient, expected)


def _verify_state(
    golden: GoldenFile, prefix: str, parameters: Mapping[str, Tensor], momentum: Momentum
) -> Iterator[Check]:
    slow = dict(momentum.named_parameters(remove_duplicate=False))
    queue = {
        "text": momentum.queue.text,
        "smiles": momentum.queue.smiles,
        "cursor": torch.tensor([momentum.queue.cursor]),
    }
    for name, value in golden.under(prefix).items():
        state = AuthorsState.translate({name: value})
        for ours, expected in ((parameters, state.model), (slow, state.momentum), (queue, state.queue)):
            for our_name, tensor in expected.items():
                result = _tensor(ours, our_name)
                yield compare(f"{prefix}: {name.split('.')[0]}", f"{prefix}.{name}", "value", result, tensor)


def _build_model(state: AuthorsState, levels: int, task: Task, t5_config: Path) -> AtomasModel:
    """A model of the golden state's sizes: what its tensors tell is taken from them."""
    if not 1 <= levels <= len(RATIOS) + 1:
        raise AtomasError(f"the golden model aligns {levels} levels; 1 to {len(RATIOS) + 1} are known")
    embedding = _tensor(state.model, "encoder.backbone.t5.shared.weight")
    head = state.model.get("encoder.backbone.t5.lm_head.weight", embedding)
    return AtomasModel(
        ModelConfig(pooling="position_linear", ratios=RATIOS[: levels - 1]),
        LossConfig(task=task, level_weights=(1.0,) * levels, false_negatives="keep"),
        vocab_size=len(embedding),
        token_budget=1 << 16,
        max_text_tokens=_tensor(state.model, "encoder.text_pooler.weight").shape[1],
        max_smiles_tokens=_tensor(state.model, "encoder.smiles_pooler.weight").shape[1],
        t5=t5_from_config(_read_t5_config(t5_config), decoder=True, tied=torch.equal(head, embedding)),
    )


@torch.no_grad()
def _load(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy every weight. A tied one may be recorded under any of its names, or under all of them."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    loaded: dict[nn.Parameter, Tensor] = {}
    for name, value in weights.items():
        if name not in parameters:
            raise AtomasError(f"golden {name} is in no model that t5_config.json describes")
        parameter = parameters[name]
        if value.shape != parameter.shape:
            raise AtomasError(f"{name}: golden {list(value.shape)}, the model's {list(parameter.shape)}")
        if parameter in loaded and not torch.equal(loaded[parameter], value):
            raise AtomasError(f"{name}: golden values differ from those of the weight it is tied to")
        loaded[parameter] = value
        parameter.copy_(value)
    for name, parameter in parameters.items():
        if parameter not in loaded:
            raise AtomasError(f"the golden state lacks our {name}")


def _batch(golden: GoldenFile) -> PairBatch:
    """Every position of the recorded ids is valid."""
    (text, text_lengths), (smiles, smiles_lengths) = flat(golden["text_ids"]), flat(golden["smiles_ids"])
    numbers = torch.arange(len(text_lengths))
    return PairBatch(
        text=RaggedTokens(ids=text, lengths=text_lengths),
        smiles=RaggedTokens(ids=smiles, lengths=smiles_lengths),
        molecule_id=numbers,
        text_id=numbers,
        sample_id=numbers,
    )


def _read_t5_config(path: Path) -> Any:
    try:
        return T5Config(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise AtomasError(f"{path} is not a T5 configuration: {' '.join(str(error).split())}") from None


def _part(name: str) -> str:
    """What a parameter of ours belongs to; one line of the table."""
    parts = {
        "backbone": "backbone",
        "pooler": "poolers",
        "polymerizations": "polymerisation",
        "importance": "importance",
    }
    return next((part for key, part in parts.items() if key in name), "temperatures")


def _tensor(tensors: Mapping[str, Any], name: str) -> Tensor:
    if name not in tensors:
        raise AtomasError(f"the golden numbers and the model do not share {name}")
    tensor: Tensor = tensors[name]
    return tensor
