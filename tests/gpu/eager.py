"""The operators in a few lines of plain PyTorch, computed in the dtype of their inputs.

Half precision rounds every step here, so the errors of these forms are what an operator's errors are measured by.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def segment_softmax(logits: Tensor, lengths: Tensor) -> Tensor:
    return torch.cat([part.softmax(dim=0) for part in logits.split(lengths.tolist())])


def cluster_merge(
    tokens: Tensor, weight: Tensor, assignment: Tensor, lengths: Tensor, cluster_lengths: Tensor
) -> Tensor:
    sizes = lengths.tolist()
    parts = (x.split(sizes) for x in (tokens, weight, assignment))
    merged = []
    for x, w, label, clusters in zip(*parts, cluster_lengths.tolist(), strict=True):
        member = (label == torch.arange(clusters, device=label.device)[:, None]) * w
        merged.append(member @ x / (member.sum(dim=1, keepdim=True) + 1e-6))
    return torch.cat(merged)


def token_interaction(
    text: Tensor,
    smiles: Tensor,
    text_weight: Tensor,
    smiles_weight: Tensor,
    text_lengths: Tensor,
    smiles_lengths: Tensor,
) -> Tensor:
    texts, molecules = text_lengths.tolist(), smiles_lengths.tolist()
    t, s = F.normalize(text, dim=1).split(texts), F.normalize(smiles, dim=1).split(molecules)
    w, v = text_weight.split(texts), smiles_weight.split(molecules)
    nothing = text.new_zeros(())
    return torch.stack(
        [
            torch.stack(
                [
                    _pair(t[a] @ s[b].T, w[a], v[b]) if texts[a] and molecules[b] else nothing
                    for b in range(len(s))
                ]
            )
            for a in range(len(t))
        ]
    )


def _pair(similarity: Tensor, w: Tensor, v: Tensor) -> Tensor:
    best = similarity.max(dim=1).values @ w + similarity.max(dim=0).values @ v
    return best / 2


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_lengths: Tensor,
    key_lengths: Tensor,
    *,
    distance_bias: Tensor,
    causal: bool,
) -> Tensor:
    reach, bias = distance_bias.shape[1] // 2, distance_bias.to(query.dtype)
    outputs = []
    sizes = query_lengths.tolist(), key_lengths.tolist(), key_lengths.tolist()
    pieces = (x.split(size) for x, size in zip((query, key, value), sizes, strict=True))
    for q, k, v in zip(*pieces, strict=True):
        places = torch.arange(len(k), device=k.device) - torch.arange(len(q), device=k.device)[:, None]
        logits = torch.einsum("ihd,jhd->hij", q, k) + bias[:, places.clamp(-reach, reach) + reach]
        if causal:
            logits = logits.masked_fill(places > 0, -torch.inf)
        outputs.append(torch.einsum("hij,jhd->ihd", logits.softmax(dim=2), v))
    return torch.cat(outputs)


def info_nce(scores: Tensor, scale: Tensor, *, negative_mask: Tensor) -> Tensor:
    own = torch.arange(len(scores), device=scores.device)
    keep = ~negative_mask | (own == own[:, None])
    logits = (scores * scale).where(keep, -torch.inf)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def contrastive_cross_entropy(
    query: Tensor,
    momentum_query: Tensor,
    keys: Tensor,
    positive: Tensor,
    temperature: Tensor,
    *,
    alpha: float,
    queue: Tensor,
    ignore: Tensor,
) -> Tensor:
    everything = torch.cat([keys, queue])
    own = F.one_hot(positive, len(everything))
    left_out = ignore & (own == 0)
    teacher = (momentum_query @ everything.T / temperature).masked_fill(left_out, -torch.inf).softmax(dim=1)
    targets = (alpha * teacher + (1 - alpha) * own).detach()
    logits = (query @ everything.T / temperature).masked_fill(left_out, -torch.inf)
    return -(targets * logits.log_softmax(dim=1)).masked_fill(left_out, 0).sum(dim=1).mean()


def lm_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, labels)
