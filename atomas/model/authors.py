"""The names of the authors' published implementation, translated into ours.

Golden numbers and the authors' released checkpoints (the `state_dict` of a PyTorch-Lightning file) use them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from atomas.errors import AtomasError
from atomas.model.momentum import FeatureQueue

_PATTERNS: tuple[tuple[str, str], ...] = (
    (r"molt5\.(.+)", r"encoder.backbone.t5.\1"),
    (r"(text|smiles)_linear\.(weight|bias)", r"encoder.\1_pooler.\2"),
    (r"temp", "temperature"),
    (r"logit_scale", "alignment.logit_scale"),
    (r"(text|smiles)_weight_fc_(\d+)\.([02]\.(?:weight|bias))", r"alignment.\1.importance.\2.\3"),
    (r"(t|s)_ctm(\d+)\.conv\.conv\.(weight)", r"\1:\2.convolution.\3"),
    (r"(t|s)_ctm(\d+)\.(norm|score)\.(weight|bias)", r"\1:\2.\3.\4"),
    (r"(t|s)_block(\d+)\.norm1\.(weight|bias)", r"\1:\2.attention.norm.\3"),
    (r"(t|s)_block(\d+)\.attn\.q\.(weight|bias)", r"\1:\2.attention.query.\3"),
    (r"(t|s)_block(\d+)\.attn\.kv\.(weight|bias)", r"\1:\2.attention.key_value.\3"),
    (r"(t|s)_block(\d+)\.attn\.proj\.(weight|bias)", r"\1:\2.attention.output.\3"),
)
_MOMENTUM_PATTERNS: tuple[tuple[str, str], ...] = (
    (r"molt5_m\.(.+)", r"encoder.backbone.t5.\1"),
    (r"(text|smiles)_linear_m\.(weight|bias)", r"encoder.\1_pooler.\2"),
)
_QUEUE_NAMES = {"text_queue": "text", "smiles_queue": "smiles", "queue_ptr": "cursor"}


@dataclass(frozen=True, kw_only=True)
class AuthorsState:
    """A state of the authors' implementation under our names and in our shapes."""

    model: dict[str, Tensor] = field(default_factory=dict)
    """By the names of `AtomasModel.named_parameters(remove_duplicate=False)`"""
    momentum: dict[str, Tensor] = field(default_factory=dict)
    """By the names of `Momentum.named_parameters(remove_duplicate=False)`"""
    queue: dict[str, Tensor] = field(default_factory=dict)
    """`text` and `smiles` [Q, D], `cursor` [1]; what is there of them"""

    unexpected: list[str] = field(default_factory=list)
    """Names that the authors' implementation does not have"""

    @classmethod
    def translate(cls, state: Mapping[str, Tensor]) -> "AuthorsState":
        """Sort and rename `state`; AtomasError for a name that the authors' implementation does not have."""
        ours = cls.sort(state)
        if ours.unexpected:
            raise AtomasError(
                f"{ours.unexpected[0]!r} is no parameter or buffer of the published implementation"
            )
        return ours

    @classmethod
    def sort(cls, state: Mapping[str, Tensor]) -> "AuthorsState":
        """Sort and rename `state`, with what is unknown set aside."""
        ours = cls()
        for name, value in state.items():
            if name in _QUEUE_NAMES:
                ours.queue[_QUEUE_NAMES[name]] = value.T if value.ndim == 2 else value
            elif translated := _first_match(_PATTERNS, name):
                # Our learnable scalars have one dimension, theirs have none.
                ours.model[translated] = value.reshape(1) if value.ndim == 0 else value
            elif translated := _first_match(_MOMENTUM_PATTERNS, name):
                ours.momentum[translated] = value
            else:
                ours.unexpected.append(name)
        return ours

    def fill(self, queue: FeatureQueue) -> None:
        """Put the authors' queue, always full, into ours. Its pairs are unknown: they match nothing."""
        queue.text.copy_(self.queue["text"])
        queue.smiles.copy_(self.queue["smiles"])
        queue.text_id.fill_(-1)
        queue.molecule_id.fill_(-1)
        queue.cursor, queue.filled = int(self.queue["cursor"]), len(queue.text)


def number_of_levels(names: Iterable[str]) -> int:
    """Levels of the hierarchy that a state of the authors with these parameter names has."""
    matches = [re.fullmatch(r"text_weight_fc_(\d+)\..+", name) for name in names]
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def _first_match(patterns: tuple[tuple[str, str], ...], name: str) -> str | None:
    for pattern, replacement in patterns:
        match = re.fullmatch(pattern, name)
        if match:
            return re.sub(r"^([ts]):(\d+)", _polymerization, match.expand(replacement))
    return None


def _polymerization(match: re.Match[str]) -> str:
    """Theirs is numbered by the level it leads to, ours from 0."""
    modality = {"t": "text", "s": "smiles"}[match[1]]
    return f"alignment.{modality}.polymerizations.{int(match[2]) - 1}"
