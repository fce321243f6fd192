"""The whole model: a batch of pairs to the losses of method section 5."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from atomas.config import LossConfig, ModelConfig
from atomas.data.batching import PairBatch, RaggedTokens
from atomas.distributed.collectives import all_gather_sizes
from atomas.errors import AtomasError
from atomas.model.alignment import HierarchicalAlignment, Level, recall_at_1
from atomas.model.backbone import Backbone, build_t5
from atomas.model.encoder import DualEncoder, Modality
from atomas.model.layers import at_least_float32, full_precision
from atomas.model.momentum import Identities, Keys, MomentumTargets, global_loss, own_columns
from atomas.model.pooling import build_pooler

TEMPERATURE_RANGE = (0.001, 0.5)


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """B sequences of one modality, ready for retrieval."""

    features: Tensor
    """[B, D] global features, L2-normalised: rank by their inner product"""
    levels: list[Level]
    """For a re-ranking by `AtomasModel.rerank_scores`; empty where the model has no hierarchy"""


class AtomasModel(nn.Module):
    """Text and SMILES through one T5, aligned globally and level by level, and generated from each other.

    A part whose weight is 0 does not exist: it costs nothing and has no parameters.
    """

    def __init__(
        self,
        model: ModelConfig,
        loss: LossConfig,
        *,
        vocab_size: int,
        token_budget: int,
        max_text_tokens: int,
        max_smiles_tokens: int,
        t5: Any = None,
    ) -> None:
        """Build from the configuration; `t5` takes the place of the network that `model` describes."""
        super().__init__()
        self.loss = loss
        if t5 is None:
            t5 = build_t5(model, vocab_size, decoder=loss.lm_weight > 0)
        backbone = Backbone(
            t5, token_budget=token_budget, activation_checkpointing=model.activation_checkpointing
        )
        width = backbone.width
        # Without the global loss a learned pooling would stay untrained; the mean has nothing to learn.
        pooling = model.pooling if loss.global_weight else "mean"
        self.encoder = DualEncoder(
            backbone,
            text_pooler=build_pooler(pooling, width=width, max_length=max_text_tokens),
            smiles_pooler=build_pooler(pooling, width=width, max_length=max_smiles_tokens),
        )
        aligned = loss.hierarchical_weight > 0 and any(loss.level_weights)
        if not (loss.global_weight or aligned or loss.lm_weight):
            raise AtomasError(
                "no loss is left: set loss.global_weight, loss.lm_weight or one of loss.level_weights"
            )
        if loss.global_weight:
            self.temperature = nn.Parameter(torch.tensor([loss.temperature]))
        self.alignment: HierarchicalAlignment | None = None
        if aligned:
            if width % model.polymerization_heads:
                raise AtomasError(
                    f"model.polymerization_heads = {model.polymerization_heads} does not divide the width "
                    f"{width} of the backbone; change it"
                )
            self.alignment = HierarchicalAlignment(width, model, loss)

    def forward(self, batch: PairBatch, targets: MomentumTargets | None = None) -> dict[str, Tensor]:
        """Losses of this rank's b pairs within the global batch of B.

        Args:
            batch: b pairs; every rank holds the same number.
            targets: what `Momentum.targets` made of this batch; None contrasts with the batch's own features.

        Returns:
            Scalars; the mean of each over ranks is that of the global batch. `loss` is the weighted total and
            carries the gradient, whose mean over ranks is the exact one of the global batch. The rest is
            detached: `loss/global`, `loss/hierarchical`, `loss/level_l` and `loss/lm` before weighting (with
            task `both` also `loss/genmol` and `loss/gentext`), `recall/text_to_smiles` and
            `recall/smiles_to_text` (in-batch R@1 of the global features), `recall/level_l`, `temperature`,
            `logit_scale`. A part without weight is absent.
        """
        text, smiles = self.encoder.states(batch)
        parts: dict[str, Tensor] = {}
        if self.loss.global_weight or self.alignment is not None:
            everyone = Identities.of_all_ranks(batch)
        if self.loss.global_weight:
            parts |= self._global(batch, text, smiles, targets, everyone)
        if self.alignment is not None:
            parts |= self._hierarchical(batch, text, smiles, everyone)
        if self.loss.lm_weight:
            parts |= self._generation(batch, text, smiles)
        weights = {
            "loss/global": self.loss.global_weight,
            "loss/hierarchical": self.loss.hierarchical_weight,
            "loss/lm": self.loss.lm_weight,
        }
        total = torch.stack([weight * parts[name] for name, weight in weights.items() if name in parts]).sum()
        return {"loss": total} | {name: value.detach() for name, value in parts.items()}

    @torch.no_grad()
    def embed(self, tokens: RaggedTokens, modality: Modality) -> Embedding:
        """B sequences of one modality; call `eval()` first, or dropout stays on."""
        states = self.encoder.backbone.encode(tokens)
        levels: list[Level] = []
        if self.alignment is not None:
            hierarchy = self.alignment.text if modality == "text" else self.alignment.smiles
            levels = hierarchy(states, tokens.lengths)
        return Embedding(features=self.encoder.pool(states, tokens.lengths, modality), levels=levels)

    @torch.no_grad()
    def rerank_scores(self, text: Embedding, smiles: Embedding) -> Tensor:
        """Hierarchical score [A, C] of A texts with C molecules; AtomasError where there is no hierarchy."""
        if self.alignment is None:
            raise AtomasError(
                "the model has no hierarchy (loss.hierarchical_weight = 0): rank by global features"
            )
        return self.alignment.scores(text.levels, smiles.levels)

    def _global(
        self,
        batch: PairBatch,
        text: Tensor,
        smiles: Tensor,
        targets: MomentumTargets | None,
        everyone: Identities,
    ) -> dict[str, Tensor]:
        text = self.encoder.pool(text, batch.text.lengths, "text")
        smiles = self.encoder.pool(smiles, batch.smiles.lengths, "smiles")
        online = Keys.of_all_ranks(text, smiles, everyone)
        alpha = self.loss.alpha
        if targets is None:
            targets, alpha = MomentumTargets(text=text, smiles=smiles, keys=online), 0.0
        own = own_columns(text)
        mine = Identities(text=batch.text_id, molecule=batch.molecule_id)
        temperature = projected_clamp(at_least_float32(self.temperature), *TEMPERATURE_RANGE)
        ignore = self._not_negative(mine, targets.identities)
        loss = global_loss(text, smiles, targets, temperature, alpha=alpha, ignore=ignore)
        not_negative = self._not_negative(mine, everyone)
        with full_precision(text.device):
            similarities = {
                "recall/text_to_smiles": text @ online.smiles.T,
                "recall/smiles_to_text": smiles @ online.text.T,
            }
        recalls = {name: recall_at_1(scores, own, not_negative) for name, scores in similarities.items()}
        return {"loss/global": loss, **recalls, "temperature": temperature.squeeze(0)}

    def _hierarchical(
        self, batch: PairBatch, text: Tensor, smiles: Tensor, everyone: Identities
    ) -> dict[str, Tensor]:
        assert self.alignment is not None
        parts: dict[str, Tensor] = self.alignment(
            self.alignment.text(text, batch.text.lengths),
            self.alignment.smiles(smiles, batch.smiles.lengths),
            self._not_negative(everyone, everyone),
        )
        return parts

    def _generation(self, batch: PairBatch, text: Tensor, smiles: Tensor) -> dict[str, Tensor]:
        """Both directions count alike where both are written, however much longer one of them is."""
        parts: dict[str, Tensor] = {}
        if self.loss.task in ("genmol", "both"):
            parts["loss/genmol"] = self._language_model(text, batch.text.lengths, batch.smiles)
        if self.loss.task in ("gentext", "both"):
            parts["loss/gentext"] = self._language_model(smiles, batch.smiles.lengths, batch.text)
        return {"loss/lm": torch.stack(list(parts.values())).mean(), **(parts if len(parts) > 1 else {})}

    def _language_model(self, states: Tensor, lengths: Tensor, targets: RaggedTokens) -> Tensor:
        """Cross entropy whose mean over ranks is the mean over the target tokens of all ranks."""
        loss = self.encoder.backbone.language_model_loss(states, lengths, targets)
        counts = all_gather_sizes(len(targets.ids), targets.ids.device, "number of target tokens")
        return loss * (len(targets.ids) * len(counts) / sum(counts))

    def _not_negative(self, rows: Identities, columns: Identities) -> Tensor | None:
        """[n, m] bool, True where a pair is no true negative; None where that is not asked for."""
        return rows.shared_with(columns) if self.loss.false_negatives == "mask" else None


class _ProjectedClamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(value)
        ctx.range = low, high
        return value.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (value,) = ctx.saved_tensors
        low, high = ctx.range
        outward = ((value <= low) & (grads[0] > 0)) | ((value >= high) & (grads[0] < 0))
        return grads[0].masked_fill(outward, 0), None, None


def projected_clamp(value: Tensor, low: float, high: float) -> Tensor:
    """Clamp whose gradient is cut only where a descent step would lead further out: the value can return.

    The published code clamps the parameter in place, which does not reach the optimizer's master weights.
    """
    result: Tensor = _ProjectedClamp.apply(value, low, high)
    return result
