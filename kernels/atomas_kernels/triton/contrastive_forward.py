"""Forward kernels of the contrastive cross entropy.

Every tile of keys leaves four numbers per row (the log-sum-exp of both softmaxes, and the student's logit in the mean
under both), which a second kernel merges in a fixed order; the temperature's gradient is known by then.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomas_kernels.triton.contrastive_tiles import (
    MASKED,
    TYPES,
    Configuration,
    Operands,
    key_types,
    logits,
    variant,
)
from atomas_kernels.triton.tuning import choose
from atomas_kernels.triton.variants import Variant, architecture, launch_options

_MERGE = {"BLOCK_ROWS": 16, "BLOCK_TILES": 64}


def candidates(architecture: int, dtype: str) -> list[Configuration]:
    """Configurations for a compute capability and a query type, the static choice first."""
    if dtype == "fp32":
        return [Configuration(64, 32 if architecture == 80 else 64, 32, 8, 2)]
    return [Configuration(64, 128, 64, 8, 3), Configuration(64, 64, 64, 4, 3)]


def run(operands: Operands, alpha: float) -> tuple[Tensor, Tensor]:
    """Loss, and what the backward pass needs of each row [3, b]: see `merge_kernel`."""
    found = candidates(architecture(operands.query.device), operands.dtype())
    best = choose(("forward", operands.signature()), found, lambda c: _run(operands, alpha, c))
    return _run(operands, alpha, best)


def _run(operands: Operands, alpha: float, best: Configuration) -> tuple[Tensor, Tensor]:
    rows = len(operands.query)
    sources = operands.sources()
    tiles = [triton.cdiv(len(source), best.keys) for source in sources]
    partial = operands.query.new_empty(sum(tiles), 4, rows, dtype=torch.float32)
    own, loss, statistics = partial.new_empty(rows), partial.new_empty(rows), partial.new_empty(3, rows)
    constants = best.constants(operands.dtype()) | best.options()
    for source, part in zip(sources, partial.split(tiles), strict=True):
        grid = (len(part), triton.cdiv(rows, best.rows))
        statistics_kernel[grid](*operands.arguments(source), part, own, **constants)
    merge_kernel[(triton.cdiv(rows, _MERGE["BLOCK_ROWS"]),)](
        partial, own, loss, statistics, rows, sum(tiles), alpha, **_MERGE, **launch_options(4, 1)
    )
    return loss.mean(), statistics


@triton.jit
def statistics_kernel(  # type: ignore[no-untyped-def]
    query,
    momentum,
    source,
    temperature,
    positive,
    ignore,
    rows,
    count,
    offset,
    ignore_stride,
    width,
    partial,
    own_logit,
    BLOCK_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_KEYS: tl.constexpr,  # noqa: N803
    BLOCK_WIDTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """Some rows with one tile of keys: log-sum-exps of student and teacher, and the means of the student's logits
    under both, to `partial` [tiles, 4, b]; the logit of the own key to `own_logit` [b] by the program that meets it.
    """
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    key = tl.program_id(0) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    x, y, own = logits(
        query,
        momentum,
        source,
        temperature,
        positive,
        ignore,
        rows,
        count,
        offset,
        ignore_stride,
        width,
        row,
        key,
        BLOCK_WIDTH,
        PRECISION,
    )
    met_own = tl.max(own.to(tl.int32), axis=1) > 0
    tl.store(own_logit + row, tl.sum(tl.where(own, x, 0.0), axis=1), mask=met_own & (row < rows))
    highest_x, highest_y = tl.max(x, axis=1), tl.max(y, axis=1)
    weight_x, weight_y = tl.exp(x - highest_x[:, None]), tl.exp(y - highest_y[:, None])
    sum_x, sum_y = tl.sum(weight_x, axis=1), tl.sum(weight_y, axis=1)
    mean_x, mean_y = tl.sum(weight_x * x, axis=1) / sum_x, tl.sum(weight_y * x, axis=1) / sum_y

    place = partial + 4 * tl.program_id(0) * rows + row
    tl.store(place, highest_x + tl.log(sum_x), mask=row < rows)
    tl.store(place + rows, highest_y + tl.log(sum_y), mask=row < rows)
    tl.store(place + 2 * rows, mean_x, mask=row < rows)
    tl.store(place + 3 * rows, mean_y, mask=row < rows)


@triton.jit
def _merge(normaliser, mean, top, total, expected):  # type: ignore[no-untyped-def]
    """Add some tiles' log-sum-exps and means (axis 1) to a running maximum, sum and expectation."""
    highest = tl.maximum(top, tl.max(normaliser, axis=1))
    fade, weight = tl.exp(top - highest), tl.exp(normaliser - highest[:, None])
    total = total * fade + tl.sum(weight, axis=1)
    return highest, total, expected * fade + tl.sum(weight * mean, axis=1)


@triton.jit
def merge_kernel(  # type: ignore[no-untyped-def]
    partial,
    own_logit,
    loss,
    statistics,
    rows,
    tiles,
    alpha,
    BLOCK_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_TILES: tl.constexpr,  # noqa: N803
):
    """From `partial` [tiles, 4, b]: the loss of each row [b]; its two log-sum-exps over all keys and the derivative
    of its loss by a factor on the logits, `statistics` [3, b].
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    top_x = tl.full((BLOCK_ROWS,), MASKED, dtype=tl.float32)
    sum_x = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    mean_x, top_y, sum_y, mean_y = sum_x, top_x, sum_x, sum_x
    for first in range(0, tiles, BLOCK_TILES):
        tile = first + tl.arange(0, BLOCK_TILES)
        place = partial + 4 * tile[None, :] * rows + row[:, None]
        inside = (tile[None, :] < tiles) & (row[:, None] < rows)
        x = tl.load(place, mask=inside, other=MASKED)
        y = tl.load(place + rows, mask=inside, other=MASKED)
        top_x, sum_x, mean_x = _merge(
            x, tl.load(place + 2 * rows, mask=inside, other=0.0), top_x, sum_x, mean_x
        )
        top_y, sum_y, mean_y = _merge(
            y, tl.load(place + 3 * rows, mask=inside, other=0.0), top_y, sum_y, mean_y
        )
    student = top_x + tl.log(sum_x)
    own = tl.load(own_logit + row, mask=row < rows, other=0.0)
    target = alpha * (mean_y / sum_y) + (1 - alpha) * own
    tl.store(loss + row, student - target, mask=row < rows)
    tl.store(statistics + row, student, mask=row < rows)
    tl.store(statistics + rows + row, top_y + tl.log(sum_y), mask=row < rows)
    tl.store(statistics + 2 * rows + row, mean_x / sum_x - target, mask=row < rows)


def variants(architecture: int) -> Iterator[Variant]:
    """Every kernel with every candidate and dtype."""
    for dtype in ("bf16", "fp16", "fp32"):
        for source in key_types(dtype):
            for best in candidates(architecture, dtype):
                yield variant(statistics_kernel, dtype, source, best)
    yield Variant(
        name="contrastive_merge",
        kernel=merge_kernel,
        signature={name: TYPES[name] for name in merge_kernel.arg_names if name not in _MERGE},
        constants=_MERGE,
        options=launch_options(4, 1),
        tensor_cores=False,
    )
