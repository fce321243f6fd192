"""Retrieval both ways: which molecule does a text describe, which text describes a molecule.

Three scores of a pair are reported. `global`: inner product of the global features. `hierarchical`: weighted token
interaction averaged over the levels (method section 3.2). `combined`: both as the logits that the losses train,
f_t . f_s / temperature + exp(logit_scale) S.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from atomas.data.batching import PairBatch
from atomas.distributed.gather import gather_rows
from atomas.model.atomas import AtomasModel, Embedding
from atomas.tasks.ranking import RankingMetrics, ranking_metrics, relevance

DIRECTIONS = ("text_to_molecule", "molecule_to_text")


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


@torch.no_grad()
def evaluate_retrieval(
    model: AtomasModel,
    batches: Iterable[tuple[PairBatch, int]],
    device: torch.device,
    *,
    hierarchical: bool = False,
    progress: bool = False,
) -> RetrievalResult:
    """Rank every molecule for every text and the reverse.

    Args:
        model: in evaluation mode.
        batches: this rank's batches and how many rows of each are real; the rest are fillers that keep the ranks
            in step. Every rank gives equally many.
        device: where the model lives.
        hierarchical: also report the `hierarchical` and `combined` scores, where the model has the hierarchy. One
            process only: every text meets every molecule at every level.
        progress: show bars.
    """
    texts: list[Embedding] = []
    molecules: list[Embedding] = []
    keep: list[Tensor] = []
    molecule_ids: list[Tensor] = []
    text_ids: list[Tensor] = []
    for cpu_batch, real in tqdm(batches, desc="embedding", unit="batch", disable=not progress):
        batch = cpu_batch.to(device)
        texts.append(model.embed(batch.text, "text"))
        molecules.append(model.embed(batch.smiles, "smiles"))
        keep.append(torch.arange(len(batch), device=device) < real)
        molecule_ids.append(batch.molecule_id)
        text_ids.append(batch.text_id)

    real_rows = gather_rows(torch.cat(keep))
    text = gather_rows(torch.cat([e.features for e in texts]).float())[real_rows]
    molecule = gather_rows(torch.cat([e.features for e in molecules]).float())[real_rows]
    molecule_id = gather_rows(torch.cat(molecule_ids))[real_rows].cpu().numpy()
    text_id = gather_rows(torch.cat(text_ids))[real_rows].cpu().numpy()

    scores = {"global": (text @ molecule.T).cpu().numpy()}
    if hierarchical and model.alignment is not None:
        own = torch.cat(keep)
        block = _hierarchical_scores(model, texts, molecules, progress)[own][:, own]
        scores["hierarchical"] = block.cpu().numpy()
        if model.loss.global_weight:
            scale = float(model.alignment.logit_scale.exp())
            scores["combined"] = scores["global"] / float(model.temperature) + scale * scores["hierarchical"]
    right = relevance(molecule_id, text_id)
    return RetrievalResult(
        pairs=len(molecule_id),
        distinct_molecules=len(np.unique(molecule_id)),
        distinct_texts=len(np.unique(text_id)),
        metrics={name: _both_ways(values, right) for name, values in scores.items()},
    )


def _both_ways(scores: NDArray[np.floating], right: NDArray[np.bool_]) -> dict[str, RankingMetrics]:
    return {
        "text_to_molecule": ranking_metrics(scores, right),
        "molecule_to_text": ranking_metrics(scores.T, right.T),
    }


def _hierarchical_scores(
    model: AtomasModel, texts: list[Embedding], molecules: list[Embedding], progress: bool
) -> Tensor:
    """[all texts, all molecules], block by block."""
    rows = [
        torch.cat([model.rerank_scores(text, molecule).float() for molecule in molecules], dim=1)
        for text in tqdm(texts, desc="token interaction", unit="block", disable=not progress)
    ]
    return torch.cat(rows)
