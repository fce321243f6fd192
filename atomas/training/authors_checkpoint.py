"""A checkpoint of the authors' implementation (`atomas.model.authors`) as one of ours.

What the tensors tell is taken from them: sizes, levels, limits, queue. What they cannot tell is that of the
published configurations. Nothing in the file is executed: tensors are read without unpickling objects.
"""

import argparse
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import T5Config

from atomas.config import Config, DataConfig, LossConfig, ModelConfig, MomentumConfig
from atomas.data.tokenizer import PAD_ID, AtomasTokenizer
from atomas.errors import AtomasError
from atomas.model.authors import AuthorsState, number_of_levels
from atomas.model.backbone import UNKNOWN_ID, VOCABULARY_LAYERS, t5_from_config
from atomas.model.momentum import FeatureQueue
from atomas.training.export import BACKBONE, EMBEDDING, OUTPUT, write_checkpoint
from atomas.training.model_files import build_model

RATIOS = (0.25, 0.5)
"""Of the published configurations."""

MOMENTUM_GROUPS = ("molt5_m", "text_linear_m", "smiles_linear_m")
QUEUE_GROUPS = ("text_queue", "smiles_queue", "queue_ptr")


@dataclass(frozen=True, kw_only=True)
class ImportedModel:
    """What a file of the authors holds, in our terms."""

    config: Config
    t5_config: T5Config
    weights: dict[str, Tensor]
    """By the names of `AtomasModel.named_parameters()`"""
    momentum: dict[str, Tensor] | None
    queue: FeatureQueue | None
    report: list[str]
    """One line for each group of tensors that is missing or unexpected"""

    def with_vocabulary(self, size: int) -> "ImportedModel":
        """At least `size` rows of embedding and output layer; new ones are copies of the row of <unk>."""
        grown = replace(
            self,
            weights=_grow(self.weights, size),
            momentum=None if self.momentum is None else _grow(self.momentum, size),
        )
        grown.t5_config.vocab_size = max(size, grown.t5_config.vocab_size)
        return grown


def import_authors(file: Path, out: Path, *, tokenizer: str, task: Literal["genmol", "gentext"]) -> list[str]:
    """Make the checkpoint `out` of the authors' `file`; what was missing or unexpected, line by line.

    Raises:
        AtomasError: the file cannot be read safely, is no such checkpoint or lacks a part of it; there is no
            tokenizer; `out` is not empty.
    """
    pieces = AtomasTokenizer.load(tokenizer)
    state, step = read_state(file)
    imported = interpret(state, task=task, source=str(file)).with_vocabulary(pieces.vocab_size)
    queue = None if imported.queue is None else dict(imported.queue.named_buffers())
    write_checkpoint(
        out, imported.config, imported.t5_config, imported.weights, pieces,
        momentum=imported.momentum, queue=queue, step=step,
    )  # fmt: skip
    return imported.report


def read_state(file: Path) -> tuple[dict[str, Tensor], int]:
    """The tensors of a safetensors or torch file, in fp32, and the step it says it was written at.

    Raises:
        AtomasError: the file is not there, or holds objects that would have to be executed to be read.
    """
    if not file.is_file():
        raise AtomasError(
            f"{file} is not a file; give a checkpoint of the authors, or a folder of `atomas export`"
        )
    try:
        if file.suffix == ".safetensors":
            content: Any = load_file(file)
        else:
            # Lightning keeps the command line among the hyper-parameters: a bag of plain values.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"objects of {found[1]}" if found else "more than tensors"
        raise AtomasError(
            f"{file} holds {what}, which are only read by running them; where you trust it, save its state_dict "
            "alone (as safetensors) and import that"
        ) from None
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise AtomasError(f"{file} cannot be read as a checkpoint: {reason[0]}") from None
    except Exception as error:  # the bytes of any other file are instructions without sense to the unpickler
        raise AtomasError(f"{file} is no checkpoint (reading it as one: {type(error).__name__})") from None
    step = content.get("global_step", 0) if isinstance(content, dict) else 0
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {
        name: value.float() if value.is_floating_point() else value
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    if not tensors:
        raise AtomasError(f"{file} holds no tensors under their names, nor a `state_dict` that does")
    return tensors, step if isinstance(step, int) else 0


def interpret(
    state: Mapping[str, Tensor], *, task: Literal["genmol", "gentext"], source: str
) -> ImportedModel:
    """Our configuration and weights for a state of the authors; `source` is named in errors.

    Raises:
        AtomasError: there is no `molt5`, or a part that is there is not complete.
    """
    groups = {name.split(".")[0] for name in state}
    if "molt5" not in groups:
        raise AtomasError(
            f"{source} has no tensors of `molt5`, so it is no checkpoint of the authors; it has: {_names(groups)}"
        )
    ours = AuthorsState.sort(state)
    levels = number_of_levels(state)
    pooled = {"text_linear", "smiles_linear"} <= groups
    has_momentum = pooled and groups.issuperset(MOMENTUM_GROUPS)
    has_queue = has_momentum and groups.issuperset(QUEUE_GROUPS)
    report = _absent(groups, levels=levels, pooled=pooled, momentum=has_momentum, queue=has_queue)
    report += [
        f"unexpected: {group} ({count} tensors), left out" for group, count in _count(ours.unexpected).items()
    ]
    t5_config = _t5_config(ours.model)
    config = _config(ours, t5_config, levels, pooled, has_momentum, task)
    weights = _without_ties(ours.model)
    tied = f"{BACKBONE}{OUTPUT}" not in weights
    with torch.device("meta"):
        model = build_model(
            config, t5_config.vocab_size, t5=t5_from_config(t5_config, decoder=True, tied=tied)
        )
    expected = dict(model.named_parameters())
    missing = _count(name for name in expected if name not in weights)
    if missing:
        listed = ", ".join(f"{group} ({count} tensors)" for group, count in missing.items())
        raise AtomasError(f"{source} is not complete; of our model it lacks {listed}")
    report += [
        f"unexpected: {group} ({count} tensors), left out"
        for group, count in _count(name for name in weights if name not in expected).items()
    ]
    queue = None
    if has_queue:
        queue = FeatureQueue(config.momentum.queue_size, t5_config.d_model)
        ours.fill(queue)
    return ImportedModel(
        config=config,
        t5_config=t5_config,
        weights={name: weights[name] for name in expected},
        momentum=_without_ties(ours.momentum) if has_momentum else None,
        queue=queue,
        report=report,
    )


def _absent(groups: set[str], *, levels: int, pooled: bool, momentum: bool, queue: bool) -> list[str]:
    """What a released checkpoint has and this one does not, and what that means."""
    lines = []
    if not levels:
        lines.append("missing: text_weight_fc_*: imported without the hierarchical alignment")
    if not pooled:
        lines.append(f"missing: {_missing(groups, ('text_linear', 'smiles_linear'))}: no global alignment")
    elif not momentum:
        lines.append(f"missing: {_missing(groups, MOMENTUM_GROUPS)}: imported without the momentum copy")
    elif not queue:
        lines.append(f"missing: {_missing(groups, QUEUE_GROUPS)}: imported with an empty queue")
    return lines


def _config(
    ours: AuthorsState,
    t5: T5Config,
    levels: int,
    pooled: bool,
    momentum: bool,
    task: Literal["genmol", "gentext"],
) -> Config:
    def positions(modality: str) -> int:
        return ours.model[f"encoder.{modality}_pooler.weight"].shape[1]

    known = min(max(levels, 1), len(RATIOS) + 1)
    limits: dict[str, Any] = (
        {"max_text_tokens": positions("text"), "max_smiles_tokens": positions("smiles")} if pooled else {}
    )
    return Config(
        data=DataConfig(**limits),
        model=ModelConfig(
            d_model=t5.d_model,
            d_kv=t5.d_kv,
            d_ff=t5.d_ff,
            num_layers=t5.num_layers,
            num_decoder_layers=t5.num_decoder_layers,
            num_heads=t5.num_heads,
            feed_forward="gated-gelu" if t5.is_gated_act else "relu",
            tie_word_embeddings=f"{BACKBONE}{OUTPUT}" not in _without_ties(ours.model),
            dropout_rate=t5.dropout_rate,
            pooling="position_linear" if pooled else "mean",
            ratios=RATIOS[: known - 1],
        ),
        loss=LossConfig(
            task=task,
            global_weight=1.0 if pooled else 0.0,
            hierarchical_weight=1.0 if levels else 0.0,
            level_weights=(1.0,) * known,
            false_negatives="keep",
        ),
        momentum=MomentumConfig(
            enabled=momentum, queue_size=len(ours.queue["text"]) if "text" in ours.queue else 0
        ),
    )


def _t5_config(weights: Mapping[str, Tensor]) -> T5Config:
    """What the sizes of T5's tensors say; the rest is that of MolT5."""

    def shape(name: str) -> torch.Size:
        if f"{BACKBONE}{name}" not in weights:
            raise AtomasError(f"the checkpoint's molt5 lacks {name}: it is no complete T5")
        return weights[f"{BACKBONE}{name}"].shape

    def layers(stack: str) -> int:
        numbers = [re.match(rf"{re.escape(BACKBONE)}{stack}\.block\.(\d+)\.", name) for name in weights]
        return 1 + max((int(match[1]) for match in numbers if match), default=0)

    first = "encoder.block.0.layer"
    gated = f"{BACKBONE}{first}.1.DenseReluDense.wi_0.weight" in weights
    buckets, heads = shape(f"{first}.0.SelfAttention.relative_attention_bias.weight")
    vocab_size, width = shape(EMBEDDING)
    return T5Config(
        vocab_size=vocab_size,
        d_model=width,
        d_kv=shape(f"{first}.0.SelfAttention.q.weight")[0] // heads,
        d_ff=shape(f"{first}.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight")[0],
        num_layers=layers("encoder"),
        num_decoder_layers=layers("decoder"),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu" if gated else "relu",
        # T5 v1.1, which is gated, does not scale the decoder's outputs: see `t5_from_config`
        tie_word_embeddings=not gated,
        decoder_start_token_id=PAD_ID,
    )


def _without_ties(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tied weight under one name only, as `named_parameters` gives it."""
    embedding = weights.get(f"{BACKBONE}{EMBEDDING}")
    return {
        name: weight
        for name, weight in weights.items()
        if not (
            name.startswith(BACKBONE)
            and name.endswith(("embed_tokens.weight", OUTPUT))
            and embedding is not None
            and torch.equal(weight, embedding)
        )
    }


def _grow(weights: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    def grown(name: str, weight: Tensor) -> Tensor:
        if name.split(".")[-2:-1] not in [[layer] for layer in VOCABULARY_LAYERS] or len(weight) >= size:
            return weight
        return torch.cat([weight, weight[UNKNOWN_ID].expand(size - len(weight), -1)])

    return {name: grown(name, weight) for name, weight in weights.items()}


def _count(names: Any) -> dict[str, int]:
    """Names by group: the first part of theirs; of ours, all but the last two."""
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        group = ".".join(parts[:3]) if parts[0] in ("encoder", "alignment") else parts[0]
        counts[group] = counts.get(group, 0) + 1
    return counts


def _missing(groups: set[str], wanted: tuple[str, ...]) -> str:
    return ", ".join(name for name in wanted if name not in groups)


def _names(groups: set[str]) -> str:
    found = sorted(groups)
    return ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
