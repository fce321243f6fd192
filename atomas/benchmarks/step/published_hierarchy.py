"""The heads of the published form: clustering and token interaction over padded tokens, every result materialised.

Written from method section 3 and the table of what the published implementation does; the names of the parameters are
the published ones (see `atomas.model.authors`).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEIGHBOURS = 3


class TokenMerge(nn.Module):
    """Convolution, clustering and weighted merge: [B, N, D] -> [B, ceil(ratio N), D]."""

    def __init__(self, width: int, ratio: float, tie_noise: float) -> None:
        super().__init__()
        self.ratio = ratio
        self.tie_noise = tie_noise
        self.conv = nn.ModuleDict({"conv": nn.Conv1d(width, width, kernel_size=3, padding=1, bias=False)})
        self.norm = nn.LayerNorm(width)
        self.score = nn.Linear(width, 1)
        self.assignment: Tensor | None = None
        """[B, N] of the last forward pass, for `same_loss`"""

    def forward(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Merged tokens [B, K, D], the tokens they were made of [B, N, D], and the score [B, N] of each."""
        tokens = self.norm(tokens + self.conv["conv"](tokens.transpose(1, 2)).transpose(1, 2))
        score = self.score(tokens).squeeze(2)
        weight = score.exp() if mask is None else score.exp() * mask
        clusters = math.ceil(self.ratio * tokens.shape[1])
        with torch.no_grad():
            assignment = density_peaks(tokens, clusters, mask, self.tie_noise)
        self.assignment = assignment
        return weighted_means(tokens, weight, assignment, clusters), tokens, score


class MergedAttention(nn.Module):
    """Merged tokens read the tokens they were made of: one transformer attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.ModuleDict(
            {"q": nn.Linear(width, width), "kv": nn.Linear(width, 2 * width), "proj": nn.Linear(width, width)}
        )

    def forward(self, merged: Tensor, tokens: Tensor, score: Tensor) -> Tensor:
        """[B, K, D] from [B, K, D], [B, N, D] and [B, N]."""
        query = self._heads(self.attn["q"](self.norm1(merged)))
        key, value = (self._heads(x) for x in self.attn["kv"](self.norm1(tokens)).chunk(2, dim=2))
        logits = query @ key.transpose(2, 3) * query.shape[3] ** -0.5 + score[:, None, None, :]
        attended = (logits.softmax(dim=3) @ value).transpose(1, 2).flatten(2)
        output: Tensor = merged + self.attn["proj"](attended)
        return output

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def density_peaks(tokens: Tensor, clusters: int, mask: Tensor | None, tie_noise: float) -> Tensor:
    """Assignment [B, N] of tokens to `clusters` centres; padding is masked as a neighbour, not as a centre.

    Without the noise that breaks ties it is float64: exp rounds hundreds of densities of float32 into ties.
    """
    x = tokens.float() if tie_noise else tokens.double()
    distance = torch.cdist(x, x) / math.sqrt(tokens.shape[2])
    if mask is not None:
        distance = torch.where(mask[:, None, :] > 0, distance, distance.max() + 1)
    nearest = distance.topk(NEIGHBOURS, dim=2, largest=False).values
    density = nearest.square().mean(dim=2).neg().exp()
    density = density + torch.rand_like(density) * tie_noise
    if mask is not None:
        density = density * mask
    denser = density[:, None, :] > density[:, :, None]
    largest = distance.flatten(1).amax(dim=1)[:, None, None]
    delta = torch.where(denser, distance, largest).amin(dim=2)
    centres = (delta * density).topk(clusters, dim=1).indices
    to_centres = distance.gather(1, centres[:, :, None].expand(-1, -1, distance.shape[2]))
    own = torch.arange(clusters, device=tokens.device).expand_as(centres)
    return to_centres.argmin(dim=1).scatter(1, centres, own)


def weighted_means(tokens: Tensor, weight: Tensor, assignment: Tensor, clusters: int) -> Tensor:
    """[B, clusters, D]: mean of the members of each cluster."""
    batch, _, width = tokens.shape
    index = (assignment + torch.arange(batch, device=tokens.device)[:, None] * clusters).flatten()
    total = weight.new_zeros(batch * clusters).index_add(0, index, weight.flatten()) + 1e-6
    share = weight.flatten() / total[index]
    merged = tokens.new_zeros(batch * clusters, width).index_add(
        0, index, tokens.flatten(0, 1) * share[:, None]
    )
    return merged.view(batch, clusters, width)


def token_interaction(
    text: Tensor,
    smiles: Tensor,
    text_weight: Tensor,
    smiles_weight: Tensor,
    masks: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Scores [B, B] from tokens [B, N, D] and weights [B, N]; padding is multiplied with 0."""
    similarity = torch.einsum("atd,bsd->abts", F.normalize(text, dim=2), F.normalize(smiles, dim=2))
    if masks is not None:
        similarity = torch.einsum("abts,at->abts", similarity, masks[0])
        similarity = torch.einsum("abts,bs->abts", similarity, masks[1])
    text_to_smiles = torch.einsum("abt,at->ab", similarity.max(dim=3).values, text_weight)
    smiles_to_text = torch.einsum("abs,bs->ab", similarity.max(dim=2).values, smiles_weight)
    return (text_to_smiles + smiles_to_text) / 2


def symmetric_info_nce(scores: Tensor, scale: Tensor) -> Tensor:
    """Cross entropy of rows and of columns, averaged."""
    labels = torch.arange(len(scores), device=scores.device)
    logits = scores * scale
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
