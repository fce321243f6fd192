"""How many parameters a configuration makes, and where; the counts equal those of the model that is built."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atomas.config import Config, ModelConfig
from atomas.errors import AtomasError
from atomas.model.flops import BackboneSizes

DISTANCE_BUCKETS = 32
"""Of T5's relative positions; every published T5 has 32."""


@dataclass(frozen=True, kw_only=True)
class T5Sizes:
    """A T5, as far as memory depends on it."""

    backbone: BackboneSizes
    heads: int
    tied: bool
    """Embedding and output layer are one matrix"""
    buckets: int = DISTANCE_BUCKETS

    @classmethod
    def of_model(cls, model: ModelConfig, vocabulary: int) -> "T5Sizes":
        """Of the `model` section; `vocabulary` is the tokenizer's, and only a pretrained T5 can have more.

        Raises AtomasError where `model.pretrained` is not a folder with a T5's `config.json`.
        """
        if not model.pretrained:
            return cls(
                backbone=BackboneSizes.of_model(model, vocabulary),
                heads=model.num_heads,
                tied=model.tie_word_embeddings,
            )
        file = Path(model.pretrained) / "config.json"
        try:
            t5 = json.loads(file.read_text(encoding="utf-8"))
            projection = t5.get("feed_forward_proj", "relu")
            return cls(
                backbone=BackboneSizes(
                    width=t5["d_model"],
                    inner=t5["num_heads"] * t5["d_kv"],
                    feed_forward=t5["d_ff"],
                    gated=projection.startswith("gated"),
                    layers=t5["num_layers"],
                    decoder_layers=t5.get("num_decoder_layers") or t5["num_layers"],
                    vocabulary=max(vocabulary, t5["vocab_size"]),
                ),
                heads=t5["num_heads"],
                tied=t5.get("tie_word_embeddings", True),
                buckets=t5.get("relative_attention_num_buckets", DISTANCE_BUCKETS),
            )
        except (OSError, ValueError, KeyError) as error:
            raise AtomasError(
                f"model.pretrained = {model.pretrained!r}: no T5 config.json to read sizes from ({error}); "
                "give a folder that holds one, or set the sizes in the model section"
            ) from None

    @classmethod
    def of_t5(cls, t5: Any, *, tied: bool) -> "T5Sizes":
        """Of a `T5Config` of transformers."""
        return cls(
            backbone=BackboneSizes.of_t5(t5),
            heads=t5.num_heads,
            tied=tied,
            buckets=t5.relative_attention_num_buckets,
        )


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Parameters by part of the model."""

    embedding: int
    """With the output layer, where that is a matrix of its own"""
    encoder: int
    decoder: int
    poolers: int
    alignment: int
    scalars: int
    """Temperature and logit scale"""

    @property
    def total(self) -> int:
        """P."""
        return self.slow + self.alignment + self.scalars

    @property
    def slow(self) -> int:
        """Those of the momentum copy: the backbone and the poolers."""
        return self.embedding + self.encoder + self.decoder + self.poolers


def count_parameters(config: Config, t5: T5Sizes) -> ParameterCounts:
    """Parameters of the model that `config` describes around `t5`."""
    loss, sizes = config.loss, t5.backbone
    aligned = bool(loss.hierarchical_weight and any(loss.level_weights))
    generates = loss.lm_weight > 0
    return ParameterCounts(
        embedding=sizes.vocabulary * sizes.width * (1 if t5.tied or not generates else 2),
        encoder=_stack(t5, sizes.layers, attentions=1),
        decoder=_stack(t5, sizes.decoder_layers, attentions=2) if generates else 0,
        poolers=_poolers(config, sizes.width) if loss.global_weight else 0,
        alignment=2 * _hierarchy(config, sizes.width) if aligned else 0,
        scalars=int(loss.global_weight > 0) + int(aligned),
    )


def matrix_sizes(config: Config, t5: T5Sizes) -> list[int]:
    """Elements of each weight matrix of the same model, in its order; vectors are left out."""
    counts, sizes, width = count_parameters(config, t5), t5.backbone, t5.backbone.width
    attention, feed_forward = (
        [width * sizes.inner] * 4,
        [width * sizes.feed_forward] * (3 if sizes.gated else 2),
    )
    vocabulary = sizes.vocabulary * width
    layers = [t5.buckets * t5.heads, *(attention + feed_forward) * sizes.layers]
    if counts.decoder:
        layers += [t5.buckets * t5.heads, *(attention * 2 + feed_forward) * sizes.decoder_layers]
    output = [vocabulary] * (counts.embedding // vocabulary - 1)
    levels = [level for level, weight in enumerate(config.loss.level_weights) if weight]
    hierarchy = [3 * width**2, *[width**2] * 4] * max(levels, default=0) + [2 * width**2] * len(levels)
    return [vocabulary, *layers, *output, *hierarchy * (2 if counts.alignment else 0)]


def _stack(t5: T5Sizes, layers: int, *, attentions: int) -> int:
    sizes = t5.backbone
    attention = 4 * sizes.width * sizes.inner + sizes.width
    feed_forward = (3 if sizes.gated else 2) * sizes.width * sizes.feed_forward + sizes.width
    return layers * (attentions * attention + feed_forward) + t5.buckets * t5.heads + sizes.width


def _poolers(config: Config, width: int) -> int:
    if config.model.pooling == "position_linear":
        return config.data.max_text_tokens + config.data.max_smiles_tokens + 2
    return 2 * (width + 1) if config.model.pooling == "attention" else 0


def _hierarchy(config: Config, width: int) -> int:
    """Of one modality: polymerisations up to the highest aligned level, an importance MLP on each aligned one."""
    levels = [level for level, weight in enumerate(config.loss.level_weights) if weight]
    convolution, norms, score = 3 * width**2, 2 * 2 * width, width + 1
    attention = 4 * width**2 + 4 * width
    importance = (width + 1) * 2 * width + 2 * width + 1
    return max(levels) * (convolution + norms + score + attention) + len(levels) * importance
