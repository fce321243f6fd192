"""Floating-point operations of a training step, counted from the lengths of its ragged batch.

Matrix products only, 2 m n k for an [m, k] by [k, n] one; what is element-wise (norms, softmaxes, dropout, sorting,
the optimizer) is not counted, and poolers are not either. Nothing is counted for padding, and a causal score only
where it is read. The backward pass of a product is two products of its size, one for each factor that has a gradient.

Symbols: D width, I = heads x head width, F feed-forward width, V output vocabulary; of one sequence n tokens, t
target and s source tokens, k clusters; B pairs of all ranks, M = B + Q keys with a queue of Q. No torch here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atomas.config import Config, LossConfig, ModelConfig


@dataclass(frozen=True, kw_only=True)
class BackboneSizes:
    """What the FLOPs of a T5 depend on."""

    width: int
    """D"""
    inner: int
    """I, heads x width of a head"""
    feed_forward: int
    """F"""
    gated: bool
    """The feed-forward layer has a second input matrix (T5 v1.1)."""
    layers: int
    """Encoder layers"""
    decoder_layers: int
    """Decoder layers; not read where nothing is generated"""
    vocabulary: int
    """V, rows of the output layer"""

    @classmethod
    def of_model(cls, model: ModelConfig, vocabulary: int) -> "BackboneSizes":
        """Of a model from scratch; where `model.pretrained` is set the checkpoint decides: see `of_t5`."""
        return cls(
            width=model.d_model,
            inner=model.num_heads * model.d_kv,
            feed_forward=model.d_ff,
            gated=model.feed_forward.startswith("gated"),
            layers=model.num_layers,
            decoder_layers=model.num_decoder_layers,
            vocabulary=vocabulary,
        )

    @classmethod
    def of_t5(cls, t5: Any) -> "BackboneSizes":
        """Of a `T5Config` of transformers."""
        return cls(
            width=t5.d_model,
            inner=t5.num_heads * t5.d_kv,
            feed_forward=t5.d_ff,
            gated=t5.is_gated_act,
            layers=t5.num_layers,
            decoder_layers=t5.num_decoder_layers,
            vocabulary=t5.vocab_size,
        )


@dataclass(frozen=True, kw_only=True)
class PartFlops:
    """FLOPs of one part of a step."""

    forward: int = 0
    backward: int = 0
    redundant: int = 0
    """Products that the hardware does and the gradient does not need: a forward pass that is repeated, a dense product
    with a sparse factor."""

    def __add__(self, other: "PartFlops") -> "PartFlops":
        return PartFlops(
            forward=self.forward + other.forward,
            backward=self.backward + other.backward,
            redundant=self.redundant + other.redundant,
        )


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """FLOPs of one step by part; a part that the configuration leaves out has none.

    The names are those of the step's phases, but that the importance MLPs run in the phase of the polymerisation.
    """

    encoder: PartFlops = PartFlops()
    momentum: PartFlops = PartFlops()
    polymerisation: PartFlops = PartFlops()
    importance: PartFlops = PartFlops()
    interaction: PartFlops = PartFlops()
    contrastive: PartFlops = PartFlops()
    decoder: PartFlops = PartFlops()
    lm_loss: PartFlops = PartFlops()

    @property
    def total(self) -> PartFlops:
        """The sum of all parts."""
        parts = (getattr(self, field.name) for field in fields(self))
        return sum(parts, PartFlops())

    @property
    def model(self) -> int:
        """What loss and gradient need, whatever the implementation: the FLOPs of MFU."""
        return self.total.forward + self.total.backward

    @property
    def hardware(self) -> int:
        """What is computed, repetitions among it: the FLOPs of HFU."""
        return self.model + self.total.redundant

    def __add__(self, other: "StepFlops") -> "StepFlops":
        return StepFlops(
            **{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        )


_Lengths = NDArray[np.int64]


def count_step_flops(
    config: Config,
    sizes: BackboneSizes,
    text_lengths: Sequence[int] | NDArray[Any],
    smiles_lengths: Sequence[int] | NDArray[Any],
    *,
    queue: int = 0,
    encoded_twice: bool = False,
    scored_twice: bool = False,
) -> StepFlops:
    """FLOPs of one contrastive batch over all ranks together.

    An accumulated step is the sum of its batches.

    Args:
        config: which losses there are, the levels, momentum and activation checkpointing.
        sizes: the backbone's.
        text_lengths: tokens of each of the B texts of all ranks.
        smiles_lengths: tokens of each of the B SMILES, in the same order.
        queue: pairs that the queue holds.
        encoded_twice: gradient caching repeats encoder and levels, first without a graph.
        scored_twice: token interactions in tiles, which gradient caching and `loss.exchange = "ring"` need, are made
            again for their gradient.
    """
    text, smiles = np.asarray(text_lengths, dtype=np.int64), np.asarray(smiles_lengths, dtype=np.int64)
    loss, recomputed = config.loss, config.model.activation_checkpointing
    encoder = encoder_flops(sizes, text) + encoder_flops(sizes, smiles)
    parts: dict[str, PartFlops] = {"encoder": _trained(encoder, recomputed=recomputed)}
    if loss.global_weight:
        momentum = config.momentum.enabled
        parts["contrastive"] = _contrastive(
            len(text), sizes.width, queue if momentum else 0, momentum=momentum
        )
        if momentum:
            parts["momentum"] = PartFlops(forward=encoder)
    if loss.hierarchical_weight and any(loss.level_weights):
        parts |= _alignment(config.model, loss, sizes.width, text, smiles)
    if loss.lm_weight:
        written = {"genmol": [(text, smiles)], "gentext": [(smiles, text)]}
        directions = written.get(loss.task) or [(text, smiles), (smiles, text)]
        decoder = sum(decoder_flops(sizes, source, target) for source, target in directions)
        parts["decoder"] = _trained(decoder, recomputed=recomputed)
        parts["lm_loss"] = _trained(sum(lm_head_flops(sizes, target) for _, target in directions))
    repeated = {"encoder", "polymerisation", "importance"} if encoded_twice else set()
    if scored_twice:
        repeated.add("interaction")
    for name in repeated & parts.keys():
        parts[name] += PartFlops(redundant=parts[name].forward)
    return StepFlops(**parts)


def encoder_flops(sizes: BackboneSizes, lengths: _Lengths) -> int:
    """Forward FLOPs of the encoder: L (sum n (8 D I + f D F) + sum n^2 4 I).

    Queries, keys, values and output are four D x I products, scores and weighted values two of n x n x I, and the
    feed-forward layer has f = 4 (two D x F products), or 6 where it is gated.
    """
    linear = 8 * sizes.width * sizes.inner + _feed_forward(sizes)
    return sizes.layers * (_sum(lengths) * linear + _sum(lengths**2) * 4 * sizes.inner)


def decoder_flops(sizes: BackboneSizes, source: _Lengths, target: _Lengths) -> int:
    """Forward FLOPs of the decoder: L (sum t (12 D I + f D F) + sum s 4 D I + (sum t (t + 1) / 2 + sum t s) 4 I).

    Self-attention has four D x I products on target tokens and a score for every token at or before each token;
    cross-attention two on target and two on source tokens, and a score for every pair.
    """
    on_target = 12 * sizes.width * sizes.inner + _feed_forward(sizes)
    on_source = 4 * sizes.width * sizes.inner
    scores = _sum(target * (target + 1) // 2) + _sum(target * source)
    return sizes.decoder_layers * (
        _sum(target) * on_target + _sum(source) * on_source + scores * 4 * sizes.inner
    )


def lm_head_flops(sizes: BackboneSizes, target: _Lengths) -> int:
    """Forward FLOPs of the output layer, on target tokens only: sum t 2 D V."""
    return _sum(target) * 2 * sizes.width * sizes.vocabulary


def polymerisation_flops(width: int, lengths: _Lengths, clusters: _Lengths) -> PartFlops:
    """From one level of one modality to the next.

    Forward sum n (10 D^2 + 2 D) + sum k 4 D^2 + sum k n 4 D + sum n^2 2 D: convolution of width 3 (6 D^2), score (2 D),
    keys and values (4 D^2) on tokens; query and output on clusters; attention of clusters to tokens; distances between
    tokens. The distances only choose, and have no gradient.
    """
    on_tokens = 10 * width**2 + 2 * width
    trained = _sum(lengths) * on_tokens + _sum(clusters) * 4 * width**2 + _sum(lengths * clusters) * 4 * width
    return PartFlops(forward=trained + _sum(lengths**2) * 2 * width, backward=2 * trained)


def importance_flops(width: int, tokens: int) -> int:
    """Forward FLOPs of D -> 2 D -> 1 on each token: 4 D^2 + 4 D."""
    return tokens * (4 * width**2 + 4 * width)


def interaction_flops(width: int, text_tokens: int, smiles_tokens: int) -> PartFlops:
    """Every text token with every SMILES token of the global batch: 2 T_t T_s D.

    A maximum passes its gradient to one token, so the gradient needs no product. The kernels nevertheless make two
    dense ones of the forward's size, for they are faster than a scatter: redundant.
    """
    forward = 2 * text_tokens * smiles_tokens * width
    return PartFlops(forward=forward, redundant=2 * forward)


def cluster_counts(lengths: _Lengths, ratio: float) -> _Lengths:
    """Clusters of each sequence: k = ceil(ratio n), between 1 and n, as the clustering rounds it."""
    counts = np.ceil(lengths * ratio - 1e-9).astype(np.int64)
    return np.minimum(np.maximum(counts, 1), lengths)


def _alignment(
    model: ModelConfig, loss: LossConfig, width: int, text: _Lengths, smiles: _Lengths
) -> dict[str, PartFlops]:
    aligned = [level for level, weight in enumerate(loss.level_weights) if weight]
    polymerisation = importance = interaction = PartFlops()
    for level in range(max(aligned) + 1):
        if level:
            ratio = model.ratios[level - 1]
            below = (text, smiles)
            text, smiles = (cluster_counts(lengths, ratio) for lengths in below)
            for lengths, clusters in zip(below, (text, smiles), strict=True):
                polymerisation += polymerisation_flops(width, lengths, clusters)
        if level in aligned:
            importance += _trained(importance_flops(width, _sum(text) + _sum(smiles)))
            interaction += interaction_flops(width, _sum(text), _sum(smiles))
    return {"polymerisation": polymerisation, "importance": importance, "interaction": interaction}


def _contrastive(pairs: int, width: int, queue: int, *, momentum: bool) -> PartFlops:
    """Both directions of the global loss: every query with M keys, 2 B M D each.

    With momentum the targets are a second product, and only the queries have a gradient; without, both factors have.
    """
    product = 2 * 2 * pairs * (pairs + queue) * width
    if momentum:
        return PartFlops(forward=2 * product, backward=product)
    return _trained(product)


def _trained(forward: int, *, recomputed: bool = False) -> PartFlops:
    return PartFlops(forward=forward, backward=2 * forward, redundant=forward if recomputed else 0)


def _feed_forward(sizes: BackboneSizes) -> int:
    return (6 if sizes.gated else 4) * sizes.width * sizes.feed_forward


def _sum(values: _Lengths) -> int:
    return int(values.sum())
