"""Operators of the compiled CPU module, declared to torch so that autograd and torch.compile see them.

Tokens of half precision are widened to float32 where they are read, a few rows at a time; the tile registers of
AMX take bfloat16 tokens as they are. All sums are in float32 or better. Importing this package raises
ImportError where `_native` was not built. Results are bitwise the same for every number of threads
(`torch.get_num_threads`).

What torch does as fast stays with the reference: the momentum update (`torch._foreach_lerp_` moves each byte
once), the language model's cross entropy (chunked products of torch), InfoNCE over a matrix of scores and the
softmax of a few hundred weights (both a small share of a step).
"""

# An older build has fewer kernels: that too is an ImportError here, and not a failure in the middle of a step.
from atomas_kernels._native import attention_forward as _attention_forward  # noqa: F401
from atomas_kernels._native import dropout as _dropout  # noqa: F401
from atomas_kernels.native.attention import packed_attention
from atomas_kernels.native.clustering import cluster_merge, dpc_knn
from atomas_kernels.native.contrastive import contrastive_cross_entropy
from atomas_kernels.native.dropout import dropout
from atomas_kernels.native.interaction import token_interaction

__all__ = [
    "cluster_merge",
    "contrastive_cross_entropy",
    "dpc_knn",
    "dropout",
    "packed_attention",
    "token_interaction",
]
