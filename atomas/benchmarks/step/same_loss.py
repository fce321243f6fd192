"""Proof that what is compared is the same: at full length ours and the published form have the same losses.

Where every sequence has N tokens there is no padding that the published form could get wrong. With equal weights,
equal queues and without dropout both must then agree to rounding, gradients included.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from atomas.benchmarks.step.ours import build_model, fill
from atomas.benchmarks.step.pairs import TokenPair, collate
from atomas.benchmarks.step.presets import Preset
from atomas.benchmarks.step.published import PaddedBatch
from atomas.benchmarks.step.published_step import build_published
from atomas.config import Config
from atomas.errors import AtomasError
from atomas.model.authors import AuthorsState
from atomas.model.momentum_encoder import Momentum

TOLERANCE = 1e-4
"""Of losses, relative."""
GRADIENT_TOLERANCE = 1e-3
"""Relative, in norm, of the gradient of all parameters together."""
LOSSES = ("loss", "loss/global", "loss/hierarchical", "loss/lm")


@dataclass(frozen=True, kw_only=True)
class SameLoss:
    """How far ours is from the published form."""

    ours: dict[str, float]
    published: dict[str, float]
    gradient: float
    """Norm of the difference of the gradients over the norm of the published one"""

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

    momentum.update(weights)
    ours = model(batch, momentum.targets(batch))
    ours["loss"].backward()
    theirs = published(PaddedBatch.of(batch, preset.length))
    theirs["loss"].backward()
    gradients = {name: p.grad for name, p in published.named_parameters() if p.grad is not None}
    found = SameLoss(
        ours={name: float(ours[name].detach()) for name in LOSSES},
        published={name: float(theirs[name].detach()) for name in LOSSES},
        gradient=_gradient_deviation(AuthorsState.translate(gradients).model, weights),
    )
    # NaN fails too.
    if not (found.deviation <= TOLERANCE and found.gradient <= GRADIENT_TOLERANCE):
        raise AtomasError(
            f"at full length ours and the published form differ: losses by {found.deviation:.1e} "
            f"(at most {TOLERANCE:.0e}), gradients by {found.gradient:.1e} (at most {GRADIENT_TOLERANCE:.0e})"
        )
    return found


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
