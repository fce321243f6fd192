"""The whole model: a batch of pairs to the losses of method section 5."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from atomas.config import LossConfig, ModelConfig
from atomas.data.batching import PairBatch, RaggedTokens
from atomas.distributed.collectives import all_reduce
from atomas.errors import AtomasError
from atomas.model.alignment import HierarchicalAlignment, Level, recall_at_1
from atomas.model.backbone import END_ID, Backbone, build_t5
from atomas.model.encoder import DualEncoder, Modality
from atomas.model.global_batch import GlobalBatch
from atomas.model.layers import at_least_float32, full_precision
from atomas.model.momentum import Keys, MomentumTargets, global_loss
from atomas.model.polymerization import Clusters
from atomas.model.pooling import build_pooler
from atomas.phases import phase

TEMPERATURE_RANGE = (0.001, 0.5)


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """B sequences of one modality, ready for retrieval."""

    features: Tensor
    """[B, D] global features, L2-normalised: rank by their inner product"""
    levels: list[Level]
    """For a re-ranking by `AtomasModel.rerank_scores`; empty where the model has no hierarchy"""


class Representation(NamedTuple):
    """What the losses read of b pairs. A tuple, because ZeRO stage 3 looks for tensors in what a module returns."""

    text_states: Tensor
    """[T_t, D] encoder states"""
    smiles_states: Tensor
    """[T_s, D] encoder states"""
    features: dict[Modality, Tensor]
    """[b, D] global features; empty where there is no global loss"""
    levels: dict[Modality, list[Level]]
    """Empty where the model has no hierarchy"""


class MicroBatch(Protocol):
    """A part of a global batch whose contrastive losses are known already."""

    everyone: GlobalBatch
    clusters: Mapping[Modality, Sequence[Clusters]]
    """Those from which the losses were computed: rounding must not turn them"""

    def surrogate(self, found: Representation) -> Tensor:
        """Scalar that has their gradient through this part."""
        ...


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

    def forward(
        self,
        batch: PairBatch,
        targets: MomentumTargets | None = None,
        cached: "MicroBatch | None" = None,
    ) -> dict[str, Tensor]:
        """Losses of this rank's b pairs within the global batch of B. Collective.

        Args:
            batch: b pairs.
            targets: what `Momentum.targets` made of this batch; None contrasts with the batch's own features.
            cached: given where `batch` is one micro-batch of a global batch whose contrastive losses are known
                already, see `GradientCache`; `targets` are not read then.

        Returns:
            Scalars; the mean of each over ranks is that of the global batch. `loss` is the weighted total and
            carries the gradient, whose mean over ranks is the exact one of the global batch. The rest is
            detached: `loss/global`, `loss/hierarchical`, `loss/level_l` and `loss/lm` before weighting (with
            task `both` also `loss/genmol` and `loss/gentext`), `recall/text_to_smiles` and
            `recall/smiles_to_text` (in-batch R@1 of the global features), `recall/level_l`, `temperature`,
            `logit_scale`. A part without weight is absent.

            With `cached`, `loss` has the micro-batch's part of that gradient and no meaning as a number, and what
            else is returned, of the decoder alone, is to be summed over the micro-batches.
        """
        if cached is not None:
            everyone = cached.everyone
        else:
            everyone = GlobalBatch.of(batch) if targets is None else targets.everyone
        found = self.represent(batch) if cached is None else self.represent(batch, cached.clusters)
        parts: dict[str, Tensor] = {} if cached else self._contrast(found, targets, everyone)
        if self.loss.lm_weight:
            parts |= self._generation(batch, found, everyone)
        total = self.total(parts)
        if cached is not None:
            total = total + cached.surrogate(found)
        return {"loss": total} | {name: value.detach() for name, value in parts.items()}

    def represent(
        self, batch: PairBatch, clusters: Mapping[Modality, Sequence[Clusters]] | None = None
    ) -> "Representation":
        """What the losses read of b pairs; with the `clusters` of an earlier pass, where they are given."""
        with phase("encoder"):
            text, smiles = self.encoder.states(batch)
        sides: list[tuple[Modality, Tensor, RaggedTokens]] = [
            ("text", text, batch.text),
            ("smiles", smiles, batch.smiles),
        ]
        features: dict[Modality, Tensor] = {}
        levels: dict[Modality, list[Level]] = {}
        for modality, states, tokens in sides:
            if self.loss.global_weight:
                features[modality] = self.encoder.pool(states, tokens.lengths, modality)
            if self.alignment is not None:
                with phase("polymerisation"):  # and the importance of its levels
                    known = None if clusters is None else clusters[modality]
                    levels[modality] = self.alignment.hierarchy(modality)(states, tokens.lengths, known)
        return Representation(text_states=text, smiles_states=smiles, features=features, levels=levels)

    def total(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the losses among `parts`; 0 where there is none."""
        weights = {
            "loss/global": self.loss.global_weight,
            "loss/hierarchical": self.loss.hierarchical_weight,
            "loss/lm": self.loss.lm_weight,
        }
        found = [weight * parts[name] for name, weight in weights.items() if name in parts]
        return torch.stack(found).sum() if found else torch.zeros(())

    def start_id(self, target: Modality) -> int:
        """The decoder's first input. One that writes both learns from it which one is wanted.

        A text then begins with </s>, which stands before no other target and is in every vocabulary.
        """
        return END_ID if self.loss.task == "both" and target == "text" else self.encoder.backbone.start_id

    @torch.no_grad()
    def embed(self, tokens: RaggedTokens, modality: Modality) -> Embedding:
        """B sequences of one modality; call `eval()` first, or dropout stays on."""
        states = self.encoder.backbone.encode(tokens)
        levels: list[Level] = []
        if self.alignment is not None:
            levels = self.alignment.hierarchy(modality)(states, tokens.lengths)
        return Embedding(features=self.encoder.pool(states, tokens.lengths, modality), levels=levels)

    @torch.no_grad()
    def rerank_scores(self, text: Embedding, smiles: Embedding) -> Tensor:
        """Hierarchical score [A, C] of A texts with C molecules; AtomasError where there is no hierarchy."""
        if self.alignment is None:
            raise AtomasError(
                "the model has no hierarchy (loss.hierarchical_weight = 0): rank by global features"
            )
        return self.alignment.scores(text.levels, smiles.levels)

    def clamped_temperature(self) -> Tensor:
        """[1], the temperature of the global loss."""
        return projected_clamp(at_least_float32(self.temperature), *TEMPERATURE_RANGE)

    def global_parts(
        self,
        text: Tensor,
        smiles: Tensor,
        targets: MomentumTargets | None,
        online: Keys,
        rows: slice,
        temperature: Tensor,
        everyone: GlobalBatch,
    ) -> dict[str, Tensor]:
        """L_ga and in-batch recall of some of this rank's pairs.

        Args:
            text: [n, D] features of the texts.
            smiles: [n, D] features of the molecules.
            targets: momentum targets of these pairs; None contrasts with `online`.
            online: features of all ranks' pairs.
            rows: which of this rank's pairs these are.
            temperature: [1].
            everyone: the pairs of all ranks.

        Returns:
            Scalars whose sums over all `rows` average over ranks to those of the global batch.
        """
        partition, alpha = everyone.partition, self.loss.alpha
        own = torch.arange(len(text), device=text.device) + partition.own.start + rows.start
        if targets is None:
            targets, alpha = MomentumTargets(text=text, smiles=smiles, keys=online, everyone=everyone), 0.0
        mode = self.loss.false_negatives
        loss = global_loss(text, smiles, targets, own, temperature, alpha=alpha, false_negatives=mode)
        not_negative = None
        if mode != "keep":
            not_negative = everyone.identities[own].related_to(everyone.identities)
        with full_precision(text.device):
            recalls = {
                "recall/text_to_smiles": recall_at_1(text @ online.smiles.T, own, not_negative),
                "recall/smiles_to_text": recall_at_1(smiles @ online.text.T, own, not_negative),
            }
        share = partition.world_size * len(own) / partition.total
        return {name: value * share for name, value in {"loss/global": loss, **recalls}.items()}

    def _contrast(
        self, found: "Representation", targets: MomentumTargets | None, everyone: GlobalBatch
    ) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        if self.loss.global_weight:
            text, smiles = found.features["text"], found.features["smiles"]
            online = Keys.of_all_ranks(text, smiles, everyone)
            temperature = self.clamped_temperature()
            rows = slice(0, len(text))
            parts |= self.global_parts(text, smiles, targets, online, rows, temperature, everyone)
            parts["temperature"] = temperature.squeeze(0)
        if self.alignment is not None:
            parts |= self.alignment(found.levels["text"], found.levels["smiles"], everyone)
        return parts

    def _generation(
        self, batch: PairBatch, found: "Representation", everyone: GlobalBatch
    ) -> dict[str, Tensor]:
        """Both directions count alike where both are written, however much longer one of them is."""
        backbone = self.encoder.backbone
        parts: dict[str, Tensor] = {}

        def mean_over_tokens_of_all(loss: Tensor, tokens: RaggedTokens, of_all: int) -> Tensor:
            return loss * (everyone.partition.world_size * len(tokens.ids) / of_all)

        if self.loss.task in ("genmol", "both"):
            loss = backbone.language_model_loss(found.text_states, batch.text.lengths, batch.smiles)
            parts["loss/genmol"] = mean_over_tokens_of_all(loss, batch.smiles, everyone.smiles_tokens)
        if self.loss.task in ("gentext", "both"):
            loss = backbone.language_model_loss(
                found.smiles_states, batch.smiles.lengths, batch.text, start_id=self.start_id("text")
            )
            parts["loss/gentext"] = mean_over_tokens_of_all(loss, batch.text, everyone.text_tokens)
        return {"loss/lm": torch.stack(list(parts.values())).mean(), **(parts if len(parts) > 1 else {})}


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
        gradient = grads[0]
        at_bound = (value <= low) | (value >= high)
        if not at_bound.any():
            return gradient, None, None
        # Whether descent leads outward is for the gradient of the global batch to say.
        of_all = all_reduce(gradient.clone(), "gradient of the temperature")
        outward = ((value <= low) & (of_all > 0)) | ((value >= high) & (of_all < 0))
        return gradient.masked_fill(outward, 0), None, None


def projected_clamp(value: Tensor, low: float, high: float) -> Tensor:
    """Clamp whose gradient is cut only where a descent step would lead further out: the value can return.

    The value is the same on all ranks; at a bound, the backward pass is collective. The published code clamps the
    parameter in place, which does not reach the optimizer's master weights.
    """
    result: Tensor = _ProjectedClamp.apply(value, low, high)
    return result
