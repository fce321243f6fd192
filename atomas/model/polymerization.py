"""Adaptive polymerisation: the tokens of one level become the tokens of the next (method section 3.1)."""

from typing import NamedTuple

from torch import Tensor, nn

from atomas.model.layers import LayerNorm, Linear, SequenceConvolution, at_least_float32, full_precision
from atomas.model.ragged import positions
from atomas_kernels import cluster_merge, dpc_knn, packed_attention


class Clusters(NamedTuple):
    """Which tokens make which cluster."""

    assignment: Tensor
    """[T] int64: for every token, its cluster's number within its sequence"""
    lengths: Tensor
    """[B] int64, K_i clusters of each sequence"""


class Polymerized(NamedTuple):
    """The tokens of the next level, and which tokens each of them was made of.

    A tuple, because ZeRO stage 3 looks for tensors in what a module returns.
    """

    tokens: Tensor
    """[sum K_i, D]"""
    lengths: Tensor
    """[B] int64, K_i = ceil(ratio * N_i)"""
    assignment: Tensor
    """[T] int64: for every token of the level below, its cluster's number within its sequence"""


class Polymerization(nn.Module):
    """One step from level l to l + 1 of one modality."""

    def __init__(self, width: int, *, ratio: float, neighbours: int, heads: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.neighbours = neighbours
        self.convolution = SequenceConvolution(width)
        self.norm = LayerNorm(width)
        self.score = Linear(width, 1)
        self.attention = ClusterAttention(width, heads=heads)

    def forward(self, tokens: Tensor, lengths: Tensor, clusters: Clusters | None = None) -> Polymerized:
        """[T, D] flat tokens of B sequences and their [B] lengths, to clusters of each sequence.

        `clusters` are found from the tokens, unless they are known from an earlier pass over the same.
        """
        x = at_least_float32(tokens)
        x = self.norm(x + self.convolution(x, positions(lengths)))
        score = self.score(x).squeeze(1)
        with full_precision(x.device):
            if clusters is None:
                clusters = Clusters(*dpc_knn(x, lengths, ratio=self.ratio, k=self.neighbours))
            assignment, cluster_lengths = clusters
            merged = cluster_merge(x, score.exp(), assignment, lengths, cluster_lengths)
        tokens = merged + self.attention(merged, cluster_lengths, x, lengths, score)
        return Polymerized(tokens=tokens, lengths=cluster_lengths, assignment=assignment)


class ClusterAttention(nn.Module):
    """Clusters read the tokens of the level below: pre-norm attention with a score on every key."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = LayerNorm(width)
        self.query = Linear(width, width)
        self.key_value = Linear(width, 2 * width)
        self.output = Linear(width, width)

    def forward(
        self, merged: Tensor, cluster_lengths: Tensor, tokens: Tensor, lengths: Tensor, score: Tensor
    ) -> Tensor:
        """Queries [sum K_i, D], keys and values [T, D] and their scores [T] -> [sum K_i, D]."""
        query = self.query(self.norm(merged)).unflatten(1, (self.heads, -1))
        key, value = self.key_value(self.norm(tokens)).unflatten(1, (2, self.heads, -1)).unbind(1)
        with full_precision(tokens.device):
            attended = packed_attention(
                query * query.shape[2] ** -0.5, key, value, cluster_lengths, lengths, key_bias=score
            )
        return self.output(attended.flatten(1))
