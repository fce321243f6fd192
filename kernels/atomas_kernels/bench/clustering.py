"""Providers of density-peak clustering followed by the merge, with the gradient of tokens and weights."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from atomas_kernels.bench.harness import Case, Provider
from atomas_kernels.bench.padding import Padding
from atomas_kernels.reference import clustering as reference

_RATIO, _K = 0.25, 3


def _leaves(case: Case) -> list[Tensor]:
    generator = torch.Generator().manual_seed(case.seed)
    total = int(case.text_lengths.sum())
    tokens, score = (
        torch.randn(total, case.width, generator=generator),
        torch.randn(total, generator=generator),
    )
    return [case.leaf(x) for x in (tokens, score.exp())]


def _ragged(
    backend: Callable[[], tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]],
) -> Provider:
    def build(case: Case) -> tuple[Callable[[], Tensor], list[Tensor]]:
        cluster, merge = backend()
        tokens, weight = _leaves(case)

        def forward() -> Tensor:
            labels, counts = cluster(tokens.detach(), case.text_lengths, ratio=_RATIO, k=_K)
            return merge(tokens, weight, labels, case.text_lengths, counts)

        return forward, [tokens, weight]

    return Provider(build=build)


def _native() -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    from atomas_kernels import native

    return native.dpc_knn, native.cluster_merge


def padded_clusters(tokens: Tensor, mask: Tensor, counts: Tensor, clusters: int) -> Tensor:
    """Clusters of padded tokens [B, N, D] with batched operators, as the published form has them.

    Of sequence b only the first `counts[b]` of its `clusters` centres are real.
    """
    distance = torch.cdist(tokens, tokens) / math.sqrt(tokens.shape[-1])
    both = mask[:, :, None] & mask[:, None, :]
    distance = torch.where(both, distance, distance.amax() + 1)
    nearest = distance.topk(_K, dim=-1, largest=False).values
    density = nearest.square().mean(dim=-1).neg().exp() * mask
    denser = density[:, None, :] > density[:, :, None]
    largest = torch.where(both, distance, 0).flatten(1).amax(dim=1)[:, None, None]
    delta = torch.where(denser, distance, largest).amin(dim=-1)
    centres = (density * delta).topk(clusters, dim=-1).indices
    to_centre = distance.gather(1, centres[:, :, None].expand(-1, -1, distance.shape[1]))
    real = torch.arange(clusters) < counts[:, None]
    labels = to_centre.masked_fill(~real[:, :, None], torch.inf).argmin(dim=1)
    own = torch.arange(clusters).expand_as(centres)
    # Centres that are not real keep the label that they have.
    return labels.scatter(1, centres, torch.where(real, own, labels.gather(1, centres)))


def padded_merge(tokens: Tensor, weight: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Weighted means [B, clusters, D] of padded tokens; padding has weight 0."""
    batch, _, width = tokens.shape
    index = labels + torch.arange(batch)[:, None] * clusters
    total = weight.new_zeros(batch * clusters).index_add(0, index.flatten(), weight.flatten())
    share = weight / (total[index] + 1e-6)
    merged = tokens.new_zeros(batch * clusters, width)
    return merged.index_add(0, index.flatten(), (tokens * share[..., None]).flatten(0, 1)).view(
        batch, clusters, width
    )


def _padded(*, published: bool = False, compiled: bool = False) -> Provider:
    def build(case: Case) -> tuple[Callable[[], Tensor], list[Tensor]]:
        tokens, weight = _leaves(case)
        pad = Padding.of(case.text_lengths, published=published)
        clusters = math.ceil(_RATIO * pad.mask.shape[1])
        counts = torch.full_like(case.text_lengths, clusters)
        if not published:
            counts = reference.cluster_counts(case.text_lengths, _RATIO)
        real = torch.arange(clusters) < counts[:, None]
        keep = real.flatten().nonzero().squeeze(1)
        cluster = torch.compile(padded_clusters, dynamic=False) if compiled else padded_clusters
        merge = torch.compile(padded_merge, dynamic=False) if compiled else padded_merge

        def forward() -> Tensor:
            x, w = pad(tokens), pad(weight)
            labels = cluster(x.detach(), pad.mask, counts, clusters)
            return merge(x, w, labels, clusters).flatten(0, 1)[keep]

        return forward, [tokens, weight]

    return Provider(build=build, ragged=not published)


PROVIDERS = {
    "eager_padded": _padded(published=True),
    "eager_masked": _padded(),
    "compile_masked": _padded(compiled=True),
    "reference": _ragged(lambda: (reference.dpc_knn, reference.cluster_merge)),
    "native": _ragged(_native),
}
