"""Contrastive losses (method.md 2 and 3.2)."""

import torch
from torch import Tensor

from atomas_kernels import checks
from atomas_kernels.reference.segments import compute_dtype


def info_nce(scores: Tensor, scale: Tensor, *, negative_mask: Tensor | None) -> Tensor:
    """See `atomas_kernels.info_nce`."""
    logits = compute_dtype(scores) * scale
    if logits.shape[0] == 0:
        return logits.sum()
    positive = logits.diagonal()
    if negative_mask is not None:
        own = torch.eye(logits.shape[0], dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(negative_mask & ~own, -torch.inf)
    rows = logits.logsumexp(dim=1) - positive
    columns = logits.logsumexp(dim=0) - positive
    return (rows.mean() + columns.mean()) / 2


def contrastive_cross_entropy(
    query: Tensor,
    momentum_query: Tensor,
    keys: Tensor,
    positive: Tensor,
    temperature: Tensor,
    *,
    alpha: float,
    queue: Tensor | None,
    ignore: Tensor | None,
) -> Tensor:
    """See `atomas_kernels.contrastive_cross_entropy`.

    The targets sum to one, so the loss of a row is logsumexp(x) - sum(targets * x).
    """
    checks.index_range("positive", positive, keys.shape[0])
    query, keys = compute_dtype(query), compute_dtype(keys)
    if queue is not None:
        keys = torch.cat([keys, queue.to(keys.dtype)])
    logits = query @ keys.T / temperature
    if logits.shape[0] == 0:
        return logits.sum()
    own = positive[:, None]
    with torch.no_grad():
        momentum_logits = compute_dtype(momentum_query) @ keys.T / temperature
        if ignore is not None:
            ignore = ignore.scatter(1, own, False)
            momentum_logits = momentum_logits.masked_fill(ignore, -torch.inf)
        targets = alpha * momentum_logits.softmax(dim=1)
        targets = targets.scatter_add(1, own, targets.new_full(own.shape, 1 - alpha))
    expected = (targets * logits).sum(dim=1)
    if ignore is not None:
        logits = logits.masked_fill(ignore, -torch.inf)
    return (logits.logsumexp(dim=1) - expected).mean()
