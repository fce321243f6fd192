"""What one rank works on: a configuration, its T5, the lengths of its sequences, b pairs and W ranks."""

from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from atomas.config import Config
from atomas.model.flops import cluster_counts
from atomas.planning.sizes import ParameterCounts, T5Sizes, count_parameters

Modality = Literal["text", "smiles"]
CHEBI20_MEAN = {"text": 110.0, "smiles": 73.0}
"""Mean T5 tokens of a text and a SMILES of ChEBI-20's validation split, </s> included."""
LOG_SPREAD = {"text": 0.402, "smiles": 0.784}
"""Standard deviation of the logarithm of these lengths, which are close to log-normal."""
_SAMPLE = 512


@dataclass(frozen=True, kw_only=True)
class PairLengths:
    """Tokens of the text and of the SMILES of some pairs that stand for all."""

    text: NDArray[np.int64]
    smiles: NDArray[np.int64]

    @classmethod
    def spread(cls, text_mean: float, smiles_mean: float) -> "PairLengths":
        """Quantiles of log-normal lengths with these means and the spread of ChEBI-20, paired at random."""
        shuffled = np.random.default_rng(0).permutation(_SAMPLE)
        return cls(
            text=_quantiles(text_mean, LOG_SPREAD["text"]),
            smiles=_quantiles(smiles_mean, LOG_SPREAD["smiles"])[shuffled],
        )

    @classmethod
    def equal(cls, text: int, smiles: int) -> "PairLengths":
        """Every text and every SMILES equally long."""
        return cls(text=np.array([text]), smiles=np.array([smiles]))

    def of(self, modality: Modality) -> NDArray[np.int64]:
        """Those of one modality."""
        return self.text if modality == "text" else self.smiles


def _quantiles(mean: float, spread: float) -> NDArray[np.int64]:
    shares = (np.arange(_SAMPLE) + 0.5) / _SAMPLE
    normal = np.array([NormalDist().inv_cdf(share) for share in shares])
    drawn = np.exp(spread * normal)
    return np.maximum(2, np.round(drawn * (mean / drawn.mean()))).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of one modality: expected numbers for each pair."""

    tokens: float
    """n"""
    products: float
    """n k: tokens times the clusters they become; 0 at the highest level"""
    aligned: bool


@dataclass(frozen=True)
class Workload:
    """A step of one rank: b = `pairs` of the global batch of b W."""

    config: Config
    t5: T5Sizes
    lengths: PairLengths
    pairs: int
    ranks: int = 1
    sent: Modality | None = None
    """The modality that is exchanged between ranks; None: that with fewer tokens"""

    @property
    def width(self) -> int:
        """D."""
        return self.t5.backbone.width

    @property
    def batch(self) -> int:
        """B, pairs of all ranks."""
        return self.pairs * self.ranks

    @property
    def micro_pairs(self) -> int:
        """Pairs whose activations are held at once."""
        return min(self.config.training.micro_batch_size or self.pairs, self.pairs)

    @property
    def tiled(self) -> bool:
        """Whether scores come in tiles that are computed twice: in a ring, and with gradient caching."""
        return self.micro_pairs < self.pairs or (self.ranks > 1 and self.config.loss.exchange == "ring")

    @property
    def element_bytes(self) -> int:
        """Of an activation of the backbone, and of a token that ranks exchange."""
        return 4 if self.config.training.precision == "fp32" else 2

    @property
    def token_row_bytes(self) -> int:
        """Of a token with its float32 weight, as it is sent."""
        return self.element_bytes * self.width + 4

    @property
    def token_gradient_bytes(self) -> int:
        """Of the gradient of both, which is float32."""
        return 4 * (self.width + 1)

    @property
    def weight_bytes(self) -> int:
        """Of a weight that the forward pass reads; autocast keeps float32 weights."""
        return 2 if self.config.training.precision in ("bf16", "fp16") else 4

    @property
    def momentum_bytes(self) -> int:
        """Of a weight that the momentum copy's forward pass reads."""
        return 2 if self.config.training.precision.startswith("bf16") else 4

    def slow_share(self, stage: int) -> float:
        """Most parameters of the momentum copy of which one rank holds the masters.

        Stage 3 shares every parameter; stages 1 and 2 cut the row of all parameters, of which the copy's come first.
        """
        if stage == 0:
            return self.parameters.slow
        if stage == 3:
            return self.parameters.slow / self.ranks
        return min(self.parameters.slow, self.parameters.total / self.ranks)

    @property
    def has_momentum(self) -> bool:
        """Whether there is a momentum copy."""
        return bool(self.config.momentum.enabled and self.config.loss.global_weight)

    @cached_property
    def parameters(self) -> ParameterCounts:
        """Counts by part."""
        return count_parameters(self.config, self.t5)

    @cached_property
    def levels(self) -> dict[Modality, list[Level]]:
        """Of both modalities; empty lists without the hierarchical loss."""
        loss = self.config.loss
        weights = loss.level_weights if loss.hierarchical_weight else ()
        top = max((level for level, weight in enumerate(weights) if weight), default=-1)
        return {"text": self._levels("text", top), "smiles": self._levels("smiles", top)}

    def _levels(self, modality: Modality, top: int) -> list[Level]:
        lengths, levels = self.lengths.of(modality), []
        for level in range(top + 1):
            above = cluster_counts(lengths, self.config.model.ratios[level]) if level < top else 0 * lengths
            levels.append(
                Level(
                    tokens=float(lengths.mean()),
                    products=float((lengths * above).mean()),
                    aligned=bool(self.config.loss.level_weights[level]),
                )
            )
            lengths = above
        return levels

    @property
    def tokens(self) -> dict[Modality, float]:
        """Mean tokens of a text and of a SMILES."""
        return {"text": float(self.lengths.text.mean()), "smiles": float(self.lengths.smiles.mean())}

    @property
    def travelling(self) -> Modality:
        """What is exchanged between ranks."""
        if self.sent is not None:
            return self.sent
        return "smiles" if self.tokens["smiles"] <= self.tokens["text"] else "text"

    @property
    def written(self) -> list[tuple[Modality, Modality]]:
        """What the decoder reads and what it writes, for each direction."""
        loss = self.config.loss
        directions: dict[str, list[tuple[Modality, Modality]]] = {
            "genmol": [("text", "smiles")],
            "gentext": [("smiles", "text")],
            "both": [("text", "smiles"), ("smiles", "text")],
        }
        return directions[loss.task] if loss.lm_weight else []
