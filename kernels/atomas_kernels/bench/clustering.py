"""Providers of density-peak clustering followed by the merge, with the gradient of tokens and weights.

The assignment has no gradient: `bwd` is that of the merge.
"""

import math

import torch
from torch import Tensor

import atomas_kernels
from atomas_kernels.bench.lengths import published_length
from atomas_kernels.bench.operators import Case, Operator, Prepared, Provider, compiled, grid
from atomas_kernels.bench.padding import Padding
from atomas_kernels.reference import clustering as reference

_RATIO, _K = (0.25, 0.5), 3
"""Clusters per token, of tokens and of fragments; neighbours of a density."""


def _leaves(case: Case) -> list[Tensor]:
    generator = case.generator()
    total = int(case.text_lengths.sum())
    tokens = torch.randn(total, case.shape["width"], generator=generator)
    score = torch.randn(total, generator=generator)
    return [case.leaf(x) for x in (tokens, score.exp())]


def _exact(case: Case, semantics: str) -> Prepared:
    tokens, weight = _leaves(case)

    def forward() -> Tensor:
        ratio = _RATIO[case.shape["level"]]
        labels, counts = reference.dpc_knn(tokens.detach(), case.text_lengths, ratio=ratio, k=_K)
        return reference.cluster_merge(tokens, weight, labels, case.text_lengths, counts)

    return Prepared(forward, [tokens, weight])


def _ours(case: Case) -> Prepared:
    tokens, weight = _leaves(case)

    def forward() -> Tensor:
        ratio = _RATIO[case.shape["level"]]
        labels, counts = atomas_kernels.dpc_knn(tokens.detach(), case.text_lengths, ratio=ratio, k=_K)
        return atomas_kernels.cluster_merge(tokens, weight, labels, case.text_lengths, counts)

    return Prepared(forward, [tokens, weight])


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
    real = torch.arange(clusters, device=tokens.device) < counts[:, None]
    labels = to_centre.masked_fill(~real[:, :, None], torch.inf).argmin(dim=1)
    own = torch.arange(clusters, device=tokens.device).expand_as(centres)
    # Centres that are not real keep the label that they have.
    return labels.scatter(1, centres, torch.where(real, own, labels.gather(1, centres)))


def padded_merge(tokens: Tensor, weight: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Weighted means [B, clusters, D] of padded tokens; padding has weight 0."""
    batch, _, width = tokens.shape
    index = labels + torch.arange(batch, device=tokens.device)[:, None] * clusters
    total = weight.new_zeros(batch * clusters).index_add(0, index.flatten(), weight.flatten())
    share = weight / (total[index] + 1e-6)
    merged = tokens.new_zeros(batch * clusters, width)
    return merged.index_add(0, index.flatten(), (tokens * share[..., None]).flatten(0, 1)).view(
        batch, clusters, width
    )


def _padded(case: Case, *, published: bool = False, compile_: bool = False) -> Prepared:
    tokens, weight = _leaves(case)
    ratio = _RATIO[case.shape["level"]]
    pad = Padding.of(case.text_lengths, length=published_length(case.shape["level"]) if published else None)
    clusters = math.ceil(ratio * pad.mask.shape[1])
    counts = torch.full_like(case.text_lengths, clusters)
    if not published:
        counts = reference.cluster_counts(case.text_lengths, ratio)
    real = torch.arange(clusters, device=tokens.device) < counts[:, None]
    keep = real.flatten().nonzero().squeeze(1)
    cluster, merge = padded_clusters, padded_merge
    if compile_:
        cluster, merge = compiled(cluster), compiled(merge)

    def forward() -> Tensor:
        x, w = pad(tokens), pad(weight)
        labels = cluster(x.detach(), pad.mask, counts, clusters)
        return merge(x, w, labels, clusters).flatten(0, 1)[keep]

    return Prepared(forward, [tokens, weight])


def _no_k_means(case: Case) -> Prepared:
    raise RuntimeError("k-means has other clusters: there is no result to compare")


def _flops(case: Case) -> tuple[float, float]:
    """The Gram matrix of each sequence and the weighted sums; the gradient is the sums once more, twice."""
    lengths, width = case.text_lengths.double(), case.shape["width"]
    merge = 2 * float(lengths.sum()) * width
    return 2 * float(lengths.square().sum()) * width + merge, 2 * merge


OPERATOR = Operator(
    names=("dpc_knn", "cluster_merge"),
    shapes={
        "smoke": grid(batch=[4], width=[64], level=[1]),
        "paper": [*grid(batch=[8, 32], width=[768], level=[0]), *grid(batch=[32], width=[768], level=[1])],
        "scale": grid(batch=[64, 256, 1024], width=[768], level=[0]),
    },
    providers={
        "eager_padded": Provider(build=lambda case: _padded(case, published=True), semantics="published"),
        "eager_masked": Provider(build=_padded),
        "compile_masked": Provider(build=lambda case: _padded(case, compile_=True), compiled=True),
        "reference": Provider(build=_ours, backend="reference"),
        "native": Provider(build=_ours, backend="native"),
        "triton": Provider(build=_ours, backend="triton"),
        "flash-kmeans": Provider(
            build=_no_k_means, semantics="k_means", package="flash-kmeans", device="cuda"
        ),
    },
    exact=_exact,
    flops=_flops,
)
