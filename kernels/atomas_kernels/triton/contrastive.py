"""Soft-target contrastive cross entropy without a logits matrix, forward or backward (kernels.md 3.3).

A tile of keys, of the batch or of the queue, gives student and teacher logits from one read. Forward: every tile
leaves four numbers per row (the log-sum-exp of both, and the student's logit in the mean under both), which a second
kernel merges in a fixed order; the temperature's gradient is known by then. Backward: the tiles are computed again;
each program owns some rows and a range of tiles, and adds into memory of its own, so there is no atomic and every run
gives the same bits.

`info_nce` has no kernel: its scores [A, A] exist already, as the sum of the levels, and two log-sum-exps over them
are a fraction of the interaction that made them.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from atomas_kernels import checks
from atomas_kernels.triton.tuning import choose
from atomas_kernels.triton.variants import DTYPES, Variant, architecture, launch_options

_MERGE = {"BLOCK_ROWS": 16, "BLOCK_TILES": 64}
_PROGRAMS = 264
"""Programs that the backward pass aims at: two for each of the 132 multiprocessors of an H100. A constant, so that
results do not depend on the card.
"""

MASKED = tl.constexpr(-1e30)
"""Logit of a key that does not count: finite, so that a tile of nothing else needs no special case."""


class Configuration(NamedTuple):
    """Rows and keys of a tile, width of one step of a product, warps and stages."""

    rows: int
    keys: int
    width: int
    warps: int
    stages: int

    def constants(self, dtype: str) -> dict[str, Any]:
        """Compile-time constants for queries of Triton type `dtype`."""
        return {
            "BLOCK_ROWS": self.rows,
            "BLOCK_KEYS": self.keys,
            "BLOCK_WIDTH": self.width,
            "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
        }

    def options(self) -> dict[str, Any]:
        """Launch options."""
        return launch_options(self.warps, self.stages, maxnreg=255)


def _forward_candidates(architecture: int, dtype: str) -> list[Configuration]:
    if dtype == "fp32":
        return [Configuration(64, 32 if architecture == 80 else 64, 32, 8, 2)]
    return [Configuration(64, 128, 64, 8, 3), Configuration(64, 64, 64, 4, 3)]


def _backward_candidates(architecture: int, dtype: str) -> list[Configuration]:
    if dtype == "fp32":
        return [Configuration(64, 32, 32, 8, 2)]
    if architecture == 100:
        return [Configuration(64, 64, 64, 8, 3)]
    return [Configuration(64, 128, 64, 8, 3), Configuration(64, 64, 64, 8, 3)]


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
    """See `atomas_kernels.contrastive_cross_entropy`. A queue of another dtype is rounded to the query's, tile by
    tile.
    """
    if not len(query):
        return (query.float() * temperature.float()).sum()
    inputs = (query, momentum_query.detach(), keys, temperature.float())
    loss: Tensor = _forward(*(x.contiguous() for x in inputs), positive, alpha, queue, ignore)[0]
    return loss


@custom_op("atomas_kernels::triton_contrastive", mutates_args=())
def _forward(
    query: Tensor,
    momentum: Tensor,
    keys: Tensor,
    temperature: Tensor,
    positive: Tensor,
    alpha: float,
    queue: Tensor | None,
    ignore: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Loss, and what the backward pass needs of each row [3, b]: see `merge_kernel`."""
    checks.index_range("positive", positive, len(keys))
    operands = _Operands(query, momentum, keys, temperature, positive, queue, ignore)
    key = ("forward", operands.signature())
    candidates = _forward_candidates(architecture(query.device), operands.dtype())
    best = choose(key, candidates, lambda c: _run_forward(operands, alpha, c))
    return _run_forward(operands, alpha, best)


@_forward.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty((), dtype=torch.float32), query.new_empty(3, len(query), dtype=torch.float32)


@custom_op("atomas_kernels::triton_contrastive_backward", mutates_args=())
def _backward(
    query: Tensor,
    momentum: Tensor,
    keys: Tensor,
    temperature: Tensor,
    positive: Tensor,
    alpha: float,
    queue: Tensor | None,
    ignore: Tensor | None,
    statistics: Tensor,
    grad_loss: Tensor,
    need_keys: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, temperature and keys; the last one is empty unless `need_keys`."""
    operands = _Operands(query, momentum, keys, temperature, positive, queue, ignore)
    key = ("backward", operands.signature())
    candidates = _backward_candidates(architecture(query.device), operands.dtype())
    best = choose(key, candidates, lambda c: _query_gradient(operands, alpha, statistics, c))
    grad_query = _query_gradient(operands, alpha, statistics, best)
    scale = grad_loss / (len(query) * temperature)
    grad_keys = keys.new_empty(0)
    if need_keys:
        grad_keys = (_key_gradient(operands, alpha, statistics, best) * scale).to(keys.dtype)
    return (grad_query * scale).to(query.dtype), -scale * statistics[2].sum(), grad_keys


@_backward.register_fake
def _(query: Tensor, momentum: Tensor, keys: Tensor, temperature: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    grad_keys = torch.empty_like(keys) if rest[-1] else keys.new_empty(0)
    return torch.empty_like(query), torch.empty_like(temperature), grad_keys


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.alpha, queue, ignore = inputs
    ctx.save_for_backward(*tensors, queue, ignore, output[1])


def _gradient(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, queue, ignore, statistics = ctx.saved_tensors
    need_keys = ctx.needs_input_grad[2]
    grad_query, grad_temperature, grad_keys = _backward(
        *tensors, ctx.alpha, queue, ignore, statistics, grad_loss, need_keys
    )
    return grad_query, None, grad_keys if need_keys else None, grad_temperature, *(None,) * 4


_forward.register_autograd(_gradient, setup_context=_setup)


class _Operands(NamedTuple):
    """What both passes read."""

    query: Tensor
    momentum: Tensor
    keys: Tensor
    temperature: Tensor
    positive: Tensor
    queue: Tensor | None
    ignore: Tensor | None

    def dtype(self) -> str:
        """Triton's name of the query's dtype."""
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.query.dtype]

    def signature(self) -> tuple[Any, ...]:
        """What the fastest configuration may depend on; the batch by its power of two."""
        queue = self.queue
        sizes = tuple(triton.next_power_of_2(len(x)) for x in (self.query, self.keys))
        return (
            self.query.device,
            self.dtype(),
            self.query.shape[1],
            *sizes,
            None if queue is None else (queue.dtype, len(queue)),
            self.ignore is None,
        )

    def sources(self) -> list[Tensor]:
        """The keys of the batch and, if there are any, those of the queue."""
        has_queue = self.queue is not None and len(self.queue) > 0
        return [self.keys, self.queue.contiguous()] if has_queue else [self.keys]  # type: ignore[union-attr]

    def arguments(self, source: Tensor) -> tuple[Any, ...]:
        """The arguments with which every kernel that computes logits begins."""
        offset = 0 if source is self.keys else len(self.keys)
        ignore = None if self.ignore is None else _aligned(self.ignore[:, offset : offset + len(source)])
        return (
            self.query,
            self.momentum,
            source,
            self.temperature,
            self.positive.contiguous(),
            ignore,
            len(self.query),
            len(source),
            offset,
            0 if ignore is None else ignore.stride(0),
            self.query.shape[1],
        )


def _aligned(ignore: Tensor) -> Tensor:
    """Bytes of a bool matrix whose rows are whole vectors of 16: padded where they are not."""
    ignore = ignore.view(torch.uint8)
    sizes = (ignore.data_ptr(), ignore.stride(0), ignore.shape[1])
    if ignore.stride(1) == 1 and all(size % 16 == 0 for size in sizes):
        return ignore
    return torch.nn.functional.pad(ignore, (0, -ignore.shape[1] % 16)).contiguous()


def _run_forward(operands: _Operands, alpha: float, best: Configuration) -> tuple[Tensor, Tensor]:
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


def _query_gradient(operands: _Operands, alpha: float, statistics: Tensor, best: Configuration) -> Tensor:
    """Sum over the keys of gradient x key [b, D]; unscaled, float32."""
    query = operands.query
    sources = operands.sources()
    row_blocks = triton.cdiv(len(query), best.rows)
    tiles = [triton.cdiv(len(source), best.keys) for source in sources]
    per_split = [triton.cdiv(count, max(1, _PROGRAMS // row_blocks)) for count in tiles]
    splits = [triton.cdiv(count, each) for count, each in zip(tiles, per_split, strict=True)]
    partial = query.new_empty(sum(splits), *query.shape, dtype=torch.float32)
    constants = best.constants(operands.dtype()) | best.options()
    for source, each, part in zip(sources, per_split, partial.split(splits), strict=True):
        arguments = (*operands.arguments(source), statistics, alpha, each, part)
        query_gradient_kernel[(len(part), row_blocks)](*arguments, **constants)
    return partial.sum(0)


def _key_gradient(operands: _Operands, alpha: float, statistics: Tensor, best: Configuration) -> Tensor:
    """Sum over the rows of gradient x query [M, D]; unscaled, float32."""
    grad_keys = torch.empty_like(operands.keys, dtype=torch.float32)
    grid = (triton.cdiv(len(operands.keys), best.keys),)
    arguments = (*operands.arguments(operands.keys), statistics, alpha, grad_keys)
    key_gradient_kernel[grid](*arguments, **best.constants(operands.dtype()), **best.options())
    return grad_keys


@triton.jit
def _load(base, row, count, first, width, BLOCK_WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """[rows, BLOCK_WIDTH] of a contiguous matrix from column `first` on; 0 outside."""
    place = first + tl.arange(0, BLOCK_WIDTH)
    inside = (row[:, None] < count) & (place[None, :] < width)
    return tl.load(base + row[:, None].to(tl.int64) * width + place[None, :], mask=inside, other=0.0)


@triton.jit
def _logits(  # type: ignore[no-untyped-def]
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
    BLOCK_WIDTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """Logits of student and teacher for some rows and some keys of `source`, each key read once, MASKED where a key
    does not count; and where the own key is.
    """
    student = tl.zeros((row.shape[0], key.shape[0]), dtype=tl.float32)
    teacher = tl.zeros((row.shape[0], key.shape[0]), dtype=tl.float32)
    for first in range(0, width, BLOCK_WIDTH):
        q = _load(query, row, rows, first, width, BLOCK_WIDTH)
        m = _load(momentum, row, rows, first, width, BLOCK_WIDTH)
        k = tl.trans(_load(source, key, count, first, width, BLOCK_WIDTH).to(q.dtype))
        student = tl.dot(q, k, student, input_precision=PRECISION)
        teacher = tl.dot(m, k, teacher, input_precision=PRECISION)
    scale = 1 / tl.load(temperature)
    own_key = tl.load(positive + row, mask=row < rows, other=-1).to(tl.int32) - offset
    own = key[None, :] == own_key[:, None]
    counts = (key < count)[None, :]
    if ignore is not None:
        # Whole vectors of 16: one address each, where a byte at a time would take all registers.
        inside = (row < rows)[:, None] & (key < tl.cdiv(count, 16) * 16)[None, :]
        ignored = tl.load(
            ignore + row[:, None].to(tl.int64) * ignore_stride + key[None, :], mask=inside, other=0
        )
        counts &= own | (ignored == 0)
    return tl.where(counts, student * scale, MASKED), tl.where(counts, teacher * scale, MASKED), own


@triton.jit
def _gradient_of_logits(x, y, own, statistics, row, rows, alpha):  # type: ignore[no-untyped-def]
    """p_student - alpha p_teacher - (1 - alpha) own: the loss gradient of the student's logits, times b."""
    student = tl.load(statistics + row, mask=row < rows, other=0.0)[:, None]
    teacher = tl.load(statistics + rows + row, mask=row < rows, other=0.0)[:, None]
    return tl.exp(x - student) - alpha * tl.exp(y - teacher) - tl.where(own, 1 - alpha, 0.0)


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
    x, y, own = _logits(
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


@triton.jit
def _accumulate(  # type: ignore[no-untyped-def]
    gradient,
    source,
    key,
    count,
    width,
    target,
    row,
    rows,
    add,
    BLOCK_WIDTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """Product gradient [rows, keys] @ source [keys, width] into `target` [.., width] float32: added where
    `add`, stored otherwise.
    """
    for first in range(0, width, BLOCK_WIDTH):
        place = first + tl.arange(0, BLOCK_WIDTH)
        k = _load(source, key, count, first, width, BLOCK_WIDTH).to(gradient.dtype)
        product = tl.dot(gradient, k, input_precision=PRECISION)
        at = target + row[:, None].to(tl.int64) * width + place[None, :]
        inside = (row[:, None] < rows) & (place[None, :] < width)
        if add:
            product += tl.load(at, mask=inside, other=0.0)
        tl.store(at, product, mask=inside)


@triton.jit
def query_gradient_kernel(  # type: ignore[no-untyped-def]
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
    statistics,
    alpha,
    per_split,
    partial,
    BLOCK_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_KEYS: tl.constexpr,  # noqa: N803
    BLOCK_WIDTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """Some rows with `per_split` tiles of keys: sum of gradient x key to `partial` [splits, b, D]."""
    split = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    target = partial + split.to(tl.int64) * rows * width
    begin = split * per_split * BLOCK_KEYS
    for first in range(begin, tl.minimum(begin + per_split * BLOCK_KEYS, count), BLOCK_KEYS):
        key = first + tl.arange(0, BLOCK_KEYS)
        x, y, own = _logits(
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
        gradient = _gradient_of_logits(x, y, own, statistics, row, rows, alpha)
        gradient = gradient.to(query.dtype.element_ty)
        # A thread may read what another one wrote for the tile before.
        tl.debug_barrier()
        _accumulate(
            gradient, source, key, count, width, target, row, rows, first != begin, BLOCK_WIDTH, PRECISION
        )


@triton.jit
def key_gradient_kernel(  # type: ignore[no-untyped-def]
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
    statistics,
    alpha,
    grad_keys,
    BLOCK_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_KEYS: tl.constexpr,  # noqa: N803
    BLOCK_WIDTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """One tile of keys with every row: sum of gradient x query to `grad_keys` [M, D]."""
    key = tl.program_id(0) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    for first in range(0, rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        x, y, own = _logits(
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
        gradient = _gradient_of_logits(x, y, own, statistics, row, rows, alpha)
        gradient = tl.trans(gradient.to(query.dtype.element_ty))
        tl.debug_barrier()
        _accumulate(
            gradient, query, row, rows, width, grad_keys, key, count, first != 0, BLOCK_WIDTH, PRECISION
        )


def variants(architecture: int) -> Iterator[Variant]:
    """Every kernel with every candidate and dtype; with `ignore`, which takes more than without."""
    pointers = {"temperature": "*fp32", "positive": "*i64", "ignore": "*u8", "statistics": "*fp32"}
    integers = dict.fromkeys(("rows", "count", "offset", "tiles", "per_split"), "i32")
    outputs = dict.fromkeys(("partial", "own_logit", "loss", "grad_keys"), "*fp32")
    types = pointers | integers | outputs | {"width": "i32:16", "ignore_stride": "i32:16", "alpha": "fp32"}

    def variant(kernel: Any, dtype: str, source: str, best: Configuration) -> Variant:
        names = types | {"query": f"*{dtype}", "momentum": f"*{dtype}", "source": f"*{source}"}
        constants = best.constants(dtype)
        parts = (dtype, f"keys {source}", f"{best.rows}x{best.keys}x{best.width}", best.warps, best.stages)
        return Variant(
            name=f"contrastive_{kernel.__name__.removesuffix('_kernel')}[{','.join(map(str, parts))}]",
            kernel=kernel,
            signature={name: names[name] for name in kernel.arg_names if name not in constants},
            constants=constants,
            options=best.options(),
            tensor_cores=True,
        )

    for dtype in ("bf16", "fp16", "fp32"):
        for source in (dtype, *(other for other in DTYPES if other != dtype)):
            for best in _forward_candidates(architecture, dtype):
                yield variant(statistics_kernel, dtype, source, best)
            for best in _backward_candidates(architecture, dtype):
                yield variant(query_gradient_kernel, dtype, source, best)
        for best in _backward_candidates(architecture, dtype):
            yield variant(key_gradient_kernel, dtype, dtype, best)
    yield Variant(
        name="contrastive_merge",
        kernel=merge_kernel,
        signature={name: types[name] for name in merge_kernel.arg_names if name not in _MERGE},
        constants=_MERGE,
        options=launch_options(4, 1),
        tensor_cores=False,
    )
