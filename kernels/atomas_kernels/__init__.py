"""Operators of the Atomas method. Standalone: needs torch, and triton where there is a GPU."""

from atomas_kernels.api import (
    cluster_merge,
    contrastive_cross_entropy,
    dpc_knn,
    dropout,
    info_nce,
    lm_cross_entropy,
    momentum_update,
    packed_attention,
    segment_softmax,
    token_interaction,
)
from atomas_kernels.attention import distance_buckets
from atomas_kernels.layout import cu_seqlens_from_lengths, lengths_from_cu_seqlens
from atomas_kernels.registry import active_backend, active_backends, set_backend

__all__ = [
    "active_backend",
    "active_backends",
    "cluster_merge",
    "contrastive_cross_entropy",
    "cu_seqlens_from_lengths",
    "distance_buckets",
    "dpc_knn",
    "dropout",
    "info_nce",
    "lengths_from_cu_seqlens",
    "lm_cross_entropy",
    "momentum_update",
    "packed_attention",
    "segment_softmax",
    "set_backend",
    "token_interaction",
]
