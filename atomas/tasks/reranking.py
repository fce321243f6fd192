"""The hierarchical score for the best candidates only, in galleries where all pairs would be too many.

A query is compared with every candidate by the global features; the `depth` best are then put in the order of the
combined score, and all others stay behind them. Levels of every sequence are computed once and kept on disk.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atomas.data.progress import Progress
from atomas.errors import AtomasError
from atomas.model.alignment import Level
from atomas.model.atomas import AtomasModel, Embedding
from atomas.tasks.ranking import RankCounts, relevance

QUERIES_PER_BLOCK = 256


class LevelStore:
    """The aligned levels of n sequences of one modality in files, read back for any of them.

    Tokens are stored L2-normalised in half precision, because the interaction normalises them anyway: 2 D bytes for
    a token, one and three eighths tokens for each token of the sequence.
    """

    def __init__(self, folder: Path) -> None:
        """An empty store; `folder` must not exist."""
        folder.mkdir(parents=True)
        self._folder = folder
        self._lengths: dict[int, list[Tensor]] = {}
        self._weights: dict[int, list[Tensor]] = {}
        self._tokens: dict[int, NDArray[np.float16]] = {}
        self._starts: dict[int, Tensor] = {}

    def append(self, levels: Sequence[Level], rows: Tensor) -> None:
        """Add the sequences of a batch that are True in `rows` [b]."""
        for number, level in enumerate(levels):
            if level.weight is None:
                continue
            kept = rows.repeat_interleave(level.lengths)
            tokens = torch.nn.functional.normalize(level.tokens[kept].float(), dim=1)
            with self._file(number).open("ab") as file:
                file.write(tokens.to(torch.float16).cpu().numpy().tobytes())
            self._weights.setdefault(number, []).append(level.weight[kept].float().cpu())
            self._lengths.setdefault(number, []).append(level.lengths[rows].cpu())

    def close(self, width: int) -> None:
        """Nothing is added any more; `width` is D."""
        for number, parts in self._lengths.items():
            lengths = torch.cat(parts)
            self._lengths[number] = [lengths]
            self._weights[number] = [torch.cat(self._weights[number])]
            self._starts[number] = lengths.cumsum(0) - lengths
            shape = (int(lengths.sum()), width)
            self._tokens[number] = np.memmap(self._file(number), np.float16, "r", shape=shape)

    def read(self, sequences: Tensor, device: torch.device) -> list[Level]:
        """Levels of some sequences [n], for `HierarchicalAlignment.scores`."""
        count = max(self._lengths) + 1
        empty = Level(tokens=torch.empty(0), lengths=torch.empty(0), weight=None, assignment=None)
        levels = [empty] * count
        for number in self._lengths:
            lengths = self._lengths[number][0][sequences]
            offsets = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(
                lengths
            )
            places = self._starts[number][sequences].repeat_interleave(lengths) + offsets
            tokens = torch.from_numpy(self._tokens[number][places.numpy()]).to(device).float()
            levels[number] = Level(
                tokens=tokens,
                lengths=lengths.to(device),
                weight=self._weights[number][0][places].to(device),
                assignment=None,
            )
        return levels

    def _file(self, number: int) -> Path:
        return self._folder / f"level_{number}.f16"


def rerank(
    model: AtomasModel,
    queries: tuple[Tensor, LevelStore],
    candidates: tuple[Tensor, LevelStore],
    identities: tuple[NDArray[np.int64], NDArray[np.int64]],
    *,
    depth: int,
    queries_are_texts: bool,
    progress: Progress,
) -> tuple[RankCounts, RankCounts]:
    """Counts by the global score, and with the first `depth` candidates in the order of the combined one.

    Args:
        model: with a hierarchy and a global loss.
        queries: features [n, D] and levels; query i belongs to candidate i.
        candidates: features [n, D] and levels.
        identities: molecule and text ids [n] of the pairs.
        depth: candidates that are scored again.
        queries_are_texts: the direction.
        progress: counts queries.
    """
    assert model.alignment is not None
    features, store = queries
    others, other_store = candidates
    device = features.device
    inverse_temperature, scale = 1 / float(model.temperature), float(model.alignment.logit_scale.exp())
    depth = min(depth, len(others))
    by_global, by_both = [], []
    for first in range(0, len(features), QUERIES_PER_BLOCK):
        rows = slice(first, min(first + QUERIES_PER_BLOCK, len(features)))
        scores = features[rows] @ others.T
        nearest = scores.topk(depth, dim=1).indices
        relevant = relevance(*identities, rows)
        own = np.arange(rows.start, rows.stop)
        plain = RankCounts.of(scores.cpu().numpy(), relevant, own)
        again = np.empty((len(own), depth), dtype=np.float64)
        for place, (query, best) in enumerate(zip(own, nearest, strict=True)):
            pair = store.read(torch.tensor([query]), device), other_store.read(best.cpu(), device)
            text, smiles = pair if queries_are_texts else pair[::-1]
            levels = model.rerank_scores(
                Embedding(features=features, levels=text), Embedding(features=features, levels=smiles)
            )
            combined = scores[place, best] * inverse_temperature + scale * levels.flatten()
            again[place] = combined.cpu().numpy()
            progress.update()
        by_global.append(plain)
        by_both.append(_merge(plain, again, relevant, own, nearest.cpu().numpy()))
    return RankCounts.concatenate(by_global), RankCounts.concatenate(by_both)


def _merge(
    plain: RankCounts,
    again: NDArray[np.float64],
    relevant: NDArray[np.bool_],
    own: NDArray[np.int64],
    nearest: NDArray[np.int64],
) -> RankCounts:
    """Counts of the new order: by the new scores if a right one (the own one) is among the nearest, else as before.

    What is not among the nearest keeps its place, so a right one there has all of them before it, as it had.
    """
    if not np.isfinite(again).all():
        raise AtomasError(
            "the model's hierarchical scores hold NaN or infinity: its weights have diverged; use an older checkpoint"
        )
    right = np.take_along_axis(relevant, nearest, axis=1)
    is_own = nearest == own[:, None]
    best = np.where(right, again, -np.inf).max(axis=1, keepdims=True)
    of_own = np.where(is_own, again, -np.inf).max(axis=1, keepdims=True)
    found, own_found = right.any(axis=1), is_own.any(axis=1)
    return RankCounts(
        greater=np.where(found, ((again > best) & ~right).sum(axis=1), plain.greater),
        tied_wrong=np.where(found, ((again == best) & ~right).sum(axis=1), plain.tied_wrong),
        tied_right=np.where(found, ((again == best) & right).sum(axis=1), plain.tied_right),
        rivals=np.where(own_found, (again >= of_own).sum(axis=1) - 1, plain.rivals),
    )
