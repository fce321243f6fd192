"""Proof that what is compared is the same: at full length ours and the published form have the same losses.

Where every sequence has N tokens there is no padding that the published form could get wrong. With equal weights,
equal queues and without dropout both must then agree to rounding, gradients included.

Clusters are a discrete choice: of two centres that are equally good but for rounding, each may take another one, and
the losses then differ by more than rounding. Ours therefore goes on with the published form's clusters, and its own
ones are compared with these by themselves.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from atomas.benchmarks.step.ours import build_model, fill
from atomas.benchmarks.step.pairs import TokenPair, collate
from atomas.benchmarks.step.presets import Preset
from atomas.benchmarks.step.published import RATIOS, PaddedBatch, PublishedModel
from atomas.benchmarks.step.published_step import build_published
from atomas.config import Config
from atomas.errors import AtomasError
from atomas.model.alignment import Level
from atomas.model.authors import AuthorsState
from atomas.model.encoder import Modality
from atomas.model.momentum_encoder import Momentum
from atomas.model.polymerization import Clusters

TOLERANCE = 1e-4
"""Of losses, relative."""
GRADIENT_TOLERANCE = 1e-3
"""Relative, in norm, of the gradient of all parameters together."""
CLUSTER_TOLERANCE = 0.02
"""Of the tokens of the lowest level, those in another cluster."""
LOSSES = ("loss", "loss/global", "loss/hierarchical", "loss/lm")


@dataclass(frozen=True, kw_only=True)
class SameLoss:
    """How far ours is from the published form."""

    ours: dict[str, float]
    published: dict[str, float]
    gradient: float
    """Norm of the difference of the gradients over the norm of the published one"""
    clusters: float
    """Share of the tokens that ours puts into another cluster"""

    @property
    def deviation(self) -> float:
        """Largest relative deviation of a loss."""
        return max(abs(self.ours[name] / value - 1) for name, value in self.published.items())


def check_same_loss(config: Config, preset: Preset, device: torch.device, *, pairs: int = 2) -> SameLoss:
    """Losses and gradients of one step on `pairs` random pairs of full length, in float32.

    Raises:
        AtomasError: they differ by more than rounding.
    """
    config = replace(config, model=replace(config.model, dropout_rate=0.0))
    torch.manual_seed(0)
    published = build_published(config, preset, tie_noise=0.0).to(device)
    state = AuthorsState.translate(published.state_dict())
    model = build_model(config, preset).to(device)
    weights = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, value in state.model.items():
            weights[name].copy_(value)
    momentum = Momentum(model.encoder, config.momentum).to(device)
    fill(momentum.queue, state.queue)
    batch = collate(_full_length(preset, pairs)).to(device)

    theirs = published(PaddedBatch.of(batch, preset.length))
    theirs["loss"].backward()
    clusters = _clusters_of(published)
    with torch.no_grad():
        own = model.represent(batch).levels
    momentum.update([weights])
    model.represent = partial(model.represent, clusters=clusters)  # type: ignore[method-assign]
    ours = model(batch, momentum.targets(batch))
    ours["loss"].backward()
    gradients = {name: p.grad for name, p in published.named_parameters() if p.grad is not None}
    found = SameLoss(
        ours={name: float(ours[name].detach()) for name in LOSSES},
        published={name: float(theirs[name].detach()) for name in LOSSES},
        gradient=_gradient_deviation(AuthorsState.translate(gradients).model, weights),
        clusters=_share_elsewhere(own, clusters),
    )
    # NaN fails too.
    close = found.deviation <= TOLERANCE and found.gradient <= GRADIENT_TOLERANCE
    if not (close and found.clusters <= CLUSTER_TOLERANCE):
        raise AtomasError(
            f"at full length ours and the published form differ: losses by {found.deviation:.1e} "
            f"(at most {TOLERANCE:.0e}), gradients by {found.gradient:.1e} (at most {GRADIENT_TOLERANCE:.0e}), "
            f"clusters of {found.clusters:.1%} of the tokens (at most {CLUSTER_TOLERANCE:.0%})"
        )
    return found


def _clusters_of(published: PublishedModel) -> dict[Modality, list[Clusters]]:
    """What the last forward pass of the published form found, level by level."""
    found: dict[Modality, list[Clusters]] = {}
    letters: dict[Modality, str] = {"text": "t", "smiles": "s"}
    for modality, letter in letters.items():
        found[modality] = []
        for level, ratio in enumerate(RATIOS, start=1):
            assignment = getattr(published, f"{letter}_ctm{level}").assignment
            pairs, tokens = assignment.shape
            lengths = torch.full((pairs,), math.ceil(ratio * tokens), device=assignment.device)
            found[modality].append(Clusters(assignment.flatten(), lengths))
    return found


def _share_elsewhere(own: dict[Modality, list[Level]], clusters: dict[Modality, list[Clusters]]) -> float:
    """At the lowest level: the higher ones are made of other tokens where that one differs."""
    other = []
    for modality, (lowest, *_) in clusters.items():
        assignment = own[modality][1].assignment
        assert assignment is not None
        other.append(assignment.ne(lowest.assignment))
    return float(torch.cat(other).double().mean())


def _full_length(preset: Preset, pairs: int) -> list[TokenPair]:
    ids = torch.randint(3, preset.vocabulary, (2, pairs, preset.length - 1)).tolist()
    return [TokenPair([*text, 1], [*smiles, 1]) for text, smiles in zip(*ids, strict=True)]


def _gradient_deviation(expected: dict[str, Tensor], weights: dict[str, torch.nn.Parameter]) -> float:
    difference = norm = 0.0
    for name, value in expected.items():
        gradient = weights[name].grad
        assert gradient is not None, f"ours has no gradient of {name}"
        difference += float((gradient.double() - value.double()).square().sum())
        norm += float(value.double().square().sum())
    return (difference / norm) ** 0.5
