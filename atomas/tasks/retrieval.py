"""Retrieval both ways: which molecule does a text describe, which text describes a molecule.

Three scores of a pair are reported. `global`: inner product of the global features. `hierarchical`: weighted token
interaction averaged over the levels (method section 3.2). `combined`: both as the logits that the losses train,
f_t . f_s / temperature + exp(logit_scale) S.

All pairs have all three scores up to `EXHAUSTIVE_PAIRS`. In a larger gallery `global` ranks everything, block by
block, and `reranked` puts its best candidates in the order of `combined`.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atomas.data.batching import PairBatch
from atomas.data.progress import Progress
from atomas.distributed.gather import gather_rows
from atomas.metrics.resampling import Bootstrap
from atomas.model.atomas import AtomasModel, Embedding
from atomas.tasks.ranking import RankCounts, RankingMetrics, relevance
from atomas.tasks.reranking import LevelStore, rerank

DIRECTIONS = ("text_to_molecule", "molecule_to_text")
EXHAUSTIVE_PAIRS = 2048
"""Largest gallery in which the hierarchical score of all pairs is computed."""
SCORES_PER_BLOCK = 1 << 24
"""Entries of a block [some queries, n] of global scores; 64 MiB in float32."""


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """Metrics per score and direction, and what must be known to judge them."""

    pairs: int
    distinct_molecules: int
    distinct_texts: int
    metrics: Mapping[str, Mapping[str, RankingMetrics]] = field(default_factory=dict)
    """score name -> direction -> metrics"""

    def mean_reciprocal_rank(self, score: str) -> float:
        """Mean over both directions."""
        return sum(self.metrics[score][direction].mrr for direction in DIRECTIONS) / len(DIRECTIONS)

    def summary(self, score: str) -> str:
        """One line for a log."""
        parts = []
        for direction in DIRECTIONS:
            m = self.metrics[score][direction]
            parts.append(
                f"{direction.replace('_', ' ')} R@1 {100 * m.recall_at_1:.1f} % R@10 {100 * m.recall_at_10:.1f} % "
                f"median rank {m.median_rank:g}"
            )
        return f"{self.pairs} pairs, " + "; ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Reranking:
    """How a gallery beyond `EXHAUSTIVE_PAIRS` is ranked by the hierarchy too."""

    depth: int
    """candidates of a query that are scored again"""
    folder: Path
    """where the levels of all sequences are kept meanwhile"""


@torch.no_grad()
def evaluate_retrieval(
    model: AtomasModel,
    batches: Iterable[tuple[PairBatch, int]],
    device: torch.device,
    *,
    progress: bool = False,
    bootstrap: Bootstrap | None = None,
) -> RetrievalResult:
    """Rank every molecule for every text and the reverse by the global score.

    Args:
        model: in evaluation mode.
        batches: this rank's batches and how many rows of each are real; the rest are fillers that keep the ranks
            in step. Every rank gives equally many.
        device: where the model lives.
        progress: show bars.
        bootstrap: asks for intervals.
    """
    gallery = _Gallery()
    for batch, keep, text, smiles in _embedded(model, batches, device, progress):
        gallery.add(batch, keep, text, smiles)
    return gallery.gathered().result_by_global(bootstrap)


@torch.no_grad()
def evaluate_all_scores(
    model: AtomasModel,
    batches: Iterable[tuple[PairBatch, int]],
    device: torch.device,
    *,
    reranking: Reranking | None,
    bootstrap: Bootstrap | None = None,
) -> RetrievalResult:
    """As `evaluate_retrieval`, with the scores of the hierarchy where the model has one. One process only.

    `reranking` None computes them for all pairs; `bootstrap` asks for intervals.
    """
    if model.alignment is None:
        return evaluate_retrieval(model, batches, device, progress=True, bootstrap=bootstrap)
    gallery = _Gallery()
    texts: list[Embedding] = []
    molecules: list[Embedding] = []
    if reranking is None:
        for batch, keep, text, smiles in _embedded(model, batches, device, progress=True):
            gallery.add(batch, keep, text, smiles)
            texts.append(text)
            molecules.append(smiles)
        own = torch.cat(gallery.keep)
        return _exhaustive(model, gallery.gathered(), texts, molecules, own, bootstrap)
    with tempfile.TemporaryDirectory(dir=reranking.folder, prefix=".levels-") as folder:
        stores = LevelStore(Path(folder) / "text"), LevelStore(Path(folder) / "smiles")
        for batch, keep, text, smiles in _embedded(model, batches, device, progress=True):
            gallery.add(batch, keep, text, smiles)
            stores[0].append(text.levels, keep)
            stores[1].append(smiles.levels, keep)
        return _reranked(model, gallery.gathered(), stores, reranking.depth, bootstrap)


class _Gallery:
    """Features and identities of this rank's pairs, fillers included."""

    def __init__(self) -> None:
        self.text: list[Tensor] = []
        self.smiles: list[Tensor] = []
        self.keep: list[Tensor] = []
        self._molecule_id: list[Tensor] = []
        self._text_id: list[Tensor] = []

    def add(self, batch: PairBatch, keep: Tensor, text: Embedding, smiles: Embedding) -> None:
        """The pairs of one batch; those that are False in `keep` are fillers."""
        self.text.append(text.features)
        self.smiles.append(smiles.features)
        self.keep.append(keep)
        self._molecule_id.append(batch.molecule_id)
        self._text_id.append(batch.text_id)

    def gathered(self) -> "_Pairs":
        """The real pairs of all ranks. Collective."""
        real = gather_rows(torch.cat(self.keep), what="rows")
        return _Pairs(
            text=gather_rows(torch.cat(self.text).float(), what="features")[real],
            smiles=gather_rows(torch.cat(self.smiles).float(), what="features")[real],
            molecule_id=gather_rows(torch.cat(self._molecule_id), what="identities")[real].cpu().numpy(),
            text_id=gather_rows(torch.cat(self._text_id), what="identities")[real].cpu().numpy(),
        )


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """n pairs."""

    text: Tensor
    """[n, D] features"""
    smiles: Tensor
    molecule_id: NDArray[np.int64]
    text_id: NDArray[np.int64]

    def result(self, metrics: Mapping[str, Mapping[str, RankingMetrics]]) -> RetrievalResult:
        """`metrics` with what must be known of the pairs."""
        return RetrievalResult(
            pairs=len(self.molecule_id),
            distinct_molecules=len(np.unique(self.molecule_id)),
            distinct_texts=len(np.unique(self.text_id)),
            metrics=metrics,
        )

    def result_by_global(self, bootstrap: Bootstrap | None) -> RetrievalResult:
        """Both directions by the inner product of the features, a block of queries at a time."""
        both = zip(DIRECTIONS, ((self.text, self.smiles), (self.smiles, self.text)), strict=True)
        return self.result(
            {"global": {name: self._counts(*sides).metrics(bootstrap) for name, sides in both}}
        )

    def _counts(self, queries: Tensor, candidates: Tensor) -> RankCounts:
        size = max(1, SCORES_PER_BLOCK // max(1, len(queries)))
        parts = []
        for first in range(0, len(queries), size):
            rows = slice(first, min(first + size, len(queries)))
            scores = (queries[rows] @ candidates.T).cpu().numpy()
            right = relevance(self.molecule_id, self.text_id, rows)
            parts.append(RankCounts.of(scores, right, np.arange(rows.start, rows.stop)))
        return RankCounts.concatenate(parts)


def _embedded(
    model: AtomasModel, batches: Iterable[tuple[PairBatch, int]], device: torch.device, progress: bool
) -> Iterator[tuple[PairBatch, Tensor, Embedding, Embedding]]:
    with Progress("embedding", None, unit="batches", hidden=not progress) as bar:
        for cpu_batch, real in batches:
            batch = cpu_batch.to(device)
            keep = torch.arange(len(batch), device=device) < real
            yield batch, keep, model.embed(batch.text, "text"), model.embed(batch.smiles, "smiles")
            bar.update()


def _exhaustive(
    model: AtomasModel,
    pairs: _Pairs,
    texts: list[Embedding],
    molecules: list[Embedding],
    keep: Tensor,
    bootstrap: Bootstrap | None,
) -> RetrievalResult:
    """Every text with every molecule at every level."""
    assert model.alignment is not None
    rows = []
    with Progress("token interaction", len(texts), unit="blocks") as progress:
        for text in texts:
            rows.append(torch.cat([model.rerank_scores(text, one).float() for one in molecules], dim=1))
            progress.update()
    scores = {
        "global": (pairs.text @ pairs.smiles.T).cpu().numpy(),
        "hierarchical": torch.cat(rows)[keep][:, keep].cpu().numpy(),
    }
    if model.loss.global_weight:
        scale = float(model.alignment.logit_scale.exp())
        scores["combined"] = scores["global"] / float(model.temperature) + scale * scores["hierarchical"]
    right = relevance(pairs.molecule_id, pairs.text_id)
    own = np.arange(len(right))
    return pairs.result(
        {
            name: {
                "text_to_molecule": RankCounts.of(values, right, own).metrics(bootstrap),
                "molecule_to_text": RankCounts.of(values.T, right.T, own).metrics(bootstrap),
            }
            for name, values in scores.items()
        }
    )


def _reranked(
    model: AtomasModel,
    pairs: _Pairs,
    stores: tuple[LevelStore, LevelStore],
    depth: int,
    bootstrap: Bootstrap | None,
) -> RetrievalResult:
    """Both directions, each query with its best candidates."""
    for store in stores:
        store.close(pairs.text.shape[1])
    sides = (pairs.text, stores[0]), (pairs.smiles, stores[1])
    identities = pairs.molecule_id, pairs.text_id
    metrics: dict[str, dict[str, RankingMetrics]] = {"global": {}, "reranked": {}}
    with Progress("re-ranking", 2 * len(pairs.text), unit="queries") as progress:
        for direction, (queries, candidates) in zip(DIRECTIONS, (sides, sides[::-1]), strict=True):
            by_global, by_both = rerank(
                model, queries, candidates, identities, depth=depth,
                queries_are_texts=direction == "text_to_molecule", progress=progress,
            )  # fmt: skip
            metrics["global"][direction] = by_global.metrics(bootstrap)
            metrics["reranked"][direction] = by_both.metrics(bootstrap)
    return pairs.result(metrics)
