"""The relative positions of T5 (Raffel et al. 2020, arXiv 1910.10683, section 2.1)."""

import math

import torch
from torch import Tensor

from atomas_kernels import checks


def distance_buckets(
    *,
    buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool,
    device: torch.device | str | None = None,
) -> Tensor:
    """The bucket of every distance, so that `bias[distance_buckets(...)].T` is what `packed_attention` takes.

    Half of a direction's buckets hold one distance each; the others grow logarithmically up to
    `max_distance`, and the last one holds whatever is farther. In both directions each has half of the
    buckets; otherwise keys ahead of the query share the bucket of distance 0.

    Raises ValueError if there are too few buckets for `max_distance`.

    Returns:
        [2 * max_distance + 1] int64, for key position - query position from -max_distance to max_distance.
    """
    checks.positive_int("buckets", buckets)
    checks.positive_int("max_distance", max_distance)
    exact = buckets // 4 if bidirectional else buckets // 2
    if exact == 0:
        raise ValueError(f"buckets: {buckets} are too few to tell distances apart")
    if max_distance <= exact:
        raise ValueError(
            f"max_distance: expected more than {exact} with {buckets} buckets, got {max_distance}"
        )
    distance = torch.arange(-max_distance, max_distance + 1, device=device)
    ahead = distance > 0
    if bidirectional:
        buckets //= 2
        size = distance.abs()
    else:
        size = (-distance).clamp(min=0)
    # In float32, as every T5 was trained: it decides to which side a distance on a boundary falls.
    growth = (size.float() / exact).log() / math.log(max_distance / exact)
    coarse = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
    bucket = torch.where(size < exact, size, coarse)
    return bucket + buckets * ahead if bidirectional else bucket
