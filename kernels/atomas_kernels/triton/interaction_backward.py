"""Backward kernels of the token interaction: a product with one-hot coefficients, no atomics.

The gradient of the unit text tokens is C S, that of the unit SMILES tokens C^T T, with

    C[t, s] = G[a, b] / 2 (w_t [s is the best of b for t] + v_s [t is the best of a for s])

for t in text a and s in SMILES b. C is almost empty, but a gather would read a whole token for each of its entries;
as a product it runs on tensor cores. `coefficient_kernel` writes C once, a slab of SMILES at a time and 2 bytes per
entry in half precision, and `product_kernel` reads it in both directions. (Building the tiles of C inside the product
saves this traffic, 0.2 of 2 ms at 256 packed pairs, but builds every tile again for each 256 columns of the width and
in both directions, with registers that the accumulator needs.) `finish_kernel` takes the gradient through the
normalisation; `weight_kernel` sums G[a, b] / 2 times the saved maxima.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomas_kernels.triton.interaction_forward import Configuration, triton_dtype
from atomas_kernels.triton.packing import GROUP, ROW_BLOCK, Packed, token_of
from atomas_kernels.triton.tuning import choose
from atomas_kernels.triton.variants import DTYPES, Variant, architecture, launch_options

_COEFFICIENTS = {"ROWS": 64, "COLUMNS": 64}
_WEIGHT = {"ROWS": 64, "BLOCK_SEQUENCES": 32}


def candidates(architecture: int, dtype: str) -> list[Configuration]:
    """Configurations of the product for a compute capability and a token type, the static choice first."""
    if dtype == "fp32":
        return [Configuration(64, 64, 32, 4, 2)]
    if architecture == 80:
        return [Configuration(128, 128, 32, 8, 4)]
    if architecture == 100:
        return [Configuration(128, 128, 64, 8, 3)]
    return [Configuration(128, 128, 64, 4, 3), Configuration(128, 256, 64, 8, 4)]


def coefficients(
    text: Packed, smiles: Packed, pairs: Tensor, text_place: Tensor, smiles_place: Tensor
) -> Tensor:
    """C [text rows, SMILES rows] in the tokens' dtype, each entry twice as large and times both tokens' scales;
    `pairs` [A, Bc] is G, the others are the matches' places. Tiles behind the last sequence are not written.
    """
    c = text.tokens.new_empty(text.rows, smiles.rows)
    grid = (text.rows // _COEFFICIENTS["ROWS"], smiles.rows // _COEFFICIENTS["COLUMNS"])
    coefficient_kernel[grid](
        c, text.weight, smiles.weight, text.scale, smiles.scale, text.groups, smiles.groups, pairs,
        text_place, smiles_place, text.group_count, smiles.group_count, *pairs.stride(),
        text_place.stride(0), smiles_place.stride(0), **_COEFFICIENTS, **launch_options(4, 1),
    )  # fmt: skip
    return c


def product(c: Tensor, own: Packed, other: Packed) -> Tensor:
    """The product c @ other.tokens [own rows, width] float32; c [own rows, other rows] has any strides. Tiles behind
    the last sequence are not written.
    """
    device, dtype = c.device, triton_dtype(c)
    result = torch.empty(own.rows, own.width, device=device)

    def run(best: Configuration) -> None:
        grid = (triton.cdiv(own.width, best.columns), own.rows // best.rows)
        product_kernel[grid](
            c, other.tokens, result, own.groups, other.sequences, own.group_count, other.count, own.width,
            *c.stride(), **best.constants(dtype), **best.options(),
        )  # fmt: skip

    sizes = (own.width, own.rows.bit_length(), other.rows.bit_length())
    key = ("token_interaction_product", device, dtype, c.stride(0) == 1, *sizes)
    run(choose(key, candidates(architecture(device), dtype), run))
    return result


def finish(tokens: Tensor, own: Packed, gradient: Tensor, largest: Tensor) -> Tensor:
    """Gradient of the tokens [T, D] float32, contiguous, from that of their unit vectors [rows, width], which is in
    units of half of `largest` (scalar) and times the tokens' scales.
    """
    result = torch.empty_like(tokens, dtype=torch.float32)
    finish_kernel[(own.rows // ROW_BLOCK["ROWS"],)](
        tokens, own.groups, own.scale, gradient, largest, result, own.group_count, tokens.shape[1], own.width,
        **ROW_BLOCK, **launch_options(8, 1),
    )  # fmt: skip
    return result


def weight_gradient(own: Packed, other: Packed, pairs: Tensor, value: Tensor, tokens: int) -> Tensor:
    """sum_b G[a, b] / 2 times the maximum, [tokens] float32; `pairs` [own, other] is G, `value` the maxima."""
    result = value.new_empty(tokens)
    weight_kernel[(own.rows // _WEIGHT["ROWS"],)](
        own.groups, other.sequences, pairs, value, result, own.group_count, other.count, *pairs.stride(),
        value.stride(0), **_WEIGHT, **launch_options(4, 1),
    )  # fmt: skip
    return result


@triton.jit(do_not_specialize=["text_stride", "smiles_stride"])
def coefficient_kernel(  # type: ignore[no-untyped-def]
    c,
    text_weight,
    smiles_weight,
    text_scale,
    smiles_scale,
    text_groups,
    smiles_groups,
    pairs,
    text_place,
    smiles_place,
    text_group_count,
    smiles_group_count,
    text_stride,
    smiles_stride,
    text_place_stride,
    smiles_place_stride,
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """One tile of C. Its axes: text group, place in it, SMILES group, place in it."""
    place = tl.arange(0, GROUP)
    group = tl.program_id(0) * (ROWS // GROUP) + tl.arange(0, ROWS // GROUP)
    o_group = tl.program_id(1) * (COLUMNS // GROUP) + tl.arange(0, COLUMNS // GROUP)
    size = tl.load(text_groups + 3 * text_group_count + group)
    o_size = tl.load(smiles_groups + 3 * smiles_group_count + o_group)
    if (tl.max(size) > 0) & (tl.max(o_size) > 0):
        sequence = tl.load(text_groups + group).to(tl.int64)
        o_sequence = tl.load(smiles_groups + o_group).to(tl.int64)
        position = tl.load(text_groups + text_group_count + group)[:, None] + place[None, :]
        o_position = tl.load(smiles_groups + smiles_group_count + o_group)[:, None] + place[None, :]
        row = group[:, None] * GROUP + place[None, :]
        o_row = o_group[:, None] * GROUP + place[None, :]
        weight, scale = tl.load(text_weight + row), _finite(tl.load(text_scale + row))
        o_weight, o_scale = tl.load(smiles_weight + o_row), _finite(tl.load(smiles_scale + o_row))

        pair = tl.load(pairs + sequence[:, None] * text_stride + o_sequence[None, :] * smiles_stride)
        # Behind the last sequence nothing was written.
        exists = (size > 0)[:, None, None] & (o_size > 0)[None, None, :]
        best = text_place + (o_sequence * text_place_stride)[None, None, :] + row[:, :, None]
        best = tl.load(best, mask=exists, other=-1).to(tl.int32)
        exists = (size > 0)[:, None, None] & (o_size > 0)[None, :, None]
        o_best = smiles_place + (sequence * smiles_place_stride)[:, None, None] + o_row[None, :, :]
        o_best = tl.load(o_best, mask=exists, other=-1).to(tl.int32)

        part = (weight * scale)[:, :, None] * pair[:, None, :]
        o_part = (o_weight * o_scale)[None, :, :] * pair[:, :, None]
        tile = tl.where(best[:, :, :, None] == o_position[None, None, :, :], part[:, :, :, None], 0.0)
        tile *= o_scale[None, None, :, :]
        o_tile = tl.where(o_best[:, None, :, :] == position[:, :, None, None], o_part[:, None, :, :], 0.0)
        tile += o_tile * scale[:, :, None, None]
        line = row.to(tl.int64) * (smiles_group_count * GROUP)
        to = c + line[:, :, None, None] + o_row[None, None, :, :]
        tl.store(to, tile.to(c.dtype.element_ty))


@triton.jit
def _finite(scale):  # type: ignore[no-untyped-def]
    """0 for a token that is not finite: it was packed as zero and has no part in the gradient of the others."""
    return tl.where(scale == scale, scale, 0.0)


@triton.jit(do_not_specialize=["other_count"])
def product_kernel(  # type: ignore[no-untyped-def]
    c,
    tokens,
    result,
    own_groups,
    other_sequences,
    own_group_count,
    other_count,
    width,
    own_stride,
    other_stride,
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """One tile of c @ tokens."""
    tile_row = tl.program_id(1)
    if tl.load(own_groups + 3 * own_group_count + tile_row * (ROWS // GROUP)) > 0:
        row, step = tl.arange(0, ROWS), tl.arange(0, DEPTH)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (column < width)[None, :]
        last = tl.load(other_sequences + other_count - 1)
        last += tl.cdiv(tl.load(other_sequences + 3 * other_count - 1), GROUP)
        c += (tile_row * ROWS).to(tl.int64) * own_stride
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        # Rows behind the last group, up to a whole step, are zero.
        for _ in range(0, last * GROUP, DEPTH):
            left = tl.load(c + row[:, None] * own_stride + step[None, :] * other_stride)
            right = tl.load(tokens + step[:, None] * width + column[None, :], mask=inside, other=0.0)
            total = tl.dot(left, right, total, input_precision=PRECISION)
            c += DEPTH * other_stride
            tokens += DEPTH * width
        result += (tile_row * ROWS).to(tl.int64) * width
        tl.store(result + row[:, None] * width + column[None, :], total, mask=inside)


@triton.jit
def finish_kernel(  # type: ignore[no-untyped-def]
    tokens,
    groups,
    scale,
    gradient,
    largest,
    result,
    group_count,
    width,
    packed_width,
    ROWS: tl.constexpr,  # noqa: N803
    BLOCK_WIDTH: tl.constexpr,  # noqa: N803
):
    """Some rows: from the gradient g of x / |x| to (g - x <x, g> / |x|^2) / |x|."""
    if tl.load(groups + 3 * group_count + tl.program_id(0) * (ROWS // GROUP)) == 0:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, present = token_of(groups, group_count, row)
    column = tl.arange(0, BLOCK_WIDTH)
    own = token[:, None] * width + column[None, :]
    gradient += row.to(tl.int64)[:, None] * packed_width + column[None, :]
    square = tl.zeros((ROWS,), dtype=tl.float32)
    along = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(0, width, BLOCK_WIDTH):
        inside = present[:, None] & (first + column < width)[None, :]
        x = tl.load(tokens + own + first, mask=inside, other=0.0).to(tl.float32)
        square += tl.sum(x * x, axis=1)
        along += tl.sum(x * tl.load(gradient + first, mask=inside, other=0.0), axis=1)

    unit = tl.load(scale + row)
    zero = unit == 0
    norm = tl.where(zero, 1.0, tl.sqrt_rn(square))
    along = along / norm / norm
    # NaN for a token that is not finite, as its scale is.
    factor = 0.5 * tl.load(largest) / (norm * tl.where(zero, 1.0, unit))
    for first in range(0, width, BLOCK_WIDTH):
        inside = present[:, None] & (first + column < width)[None, :]
        x = tl.load(tokens + own + first, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gradient + first, mask=inside, other=0.0)
        g = tl.where(zero[:, None], 0.0, (g - x * along[:, None]) * factor[:, None])
        tl.store(result + own + first, g, mask=inside)


@triton.jit(do_not_specialize=["others", "own_stride", "other_stride"])
def weight_kernel(  # type: ignore[no-untyped-def]
    groups,
    other_sequences,
    pairs,
    value,
    result,
    group_count,
    others,
    own_stride,
    other_stride,
    value_stride,
    ROWS: tl.constexpr,  # noqa: N803
    BLOCK_SEQUENCES: tl.constexpr,  # noqa: N803
):
    """Some rows: sum over the other side's sequences of G / 2 times the maximum."""
    if tl.load(groups + 3 * group_count + tl.program_id(0) * (ROWS // GROUP)) == 0:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, present = token_of(groups, group_count, row)
    sequence = tl.load(groups + row // GROUP).to(tl.int64)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(0, others, BLOCK_SEQUENCES):
        other = first + tl.arange(0, BLOCK_SEQUENCES)
        # Nothing was written for an empty one.
        exists = tl.load(other_sequences + 2 * others + other, mask=other < others, other=0) > 0
        inside = exists[:, None] & present[None, :]
        pair = pairs + sequence[None, :] * own_stride + other.to(tl.int64)[:, None] * other_stride
        maximum = value + other.to(tl.int64)[:, None] * value_stride + row[None, :]
        product = tl.load(pair, mask=inside, other=0.0) * tl.load(maximum, mask=inside, other=0.0)
        total += tl.sum(product, axis=0)
    tl.store(result + token, total * 0.5, mask=present)


def variants(architecture: int) -> Iterator[Variant]:
    """See `variants.py`."""
    for dtype in DTYPES:
        for c in candidates(architecture, dtype):
            signature = {"c": f"*{dtype}", "tokens": f"*{dtype}", "result": "*fp32", "own_groups": "*i32"}
            signature |= {"other_sequences": "*i32", "own_group_count": "i32:16", "other_count": "i32"}
            for side, leading, unit in (
                ("text", "own_stride", "other_stride"),
                ("smiles", "other_stride", "own_stride"),
            ):
                yield Variant(
                    name=f"token_interaction_product[{dtype},{side},{c.rows}x{c.columns}x{c.depth}]",
                    kernel=product_kernel,
                    signature=signature | {"width": "i32:16", leading: "i32:16"},
                    constants=c.constants(dtype) | {unit: 1},
                    options=c.options(),
                    tensor_cores=True,
                )
        signature = {
            "c": f"*{dtype}",
            "text_weight": "*fp32",
            "smiles_weight": "*fp32",
            "text_scale": "*fp32",
        }
        signature |= {
            "smiles_scale": "*fp32",
            "text_groups": "*i32",
            "smiles_groups": "*i32",
            "pairs": "*fp32",
        }
        signature |= {"text_place": "*i16", "smiles_place": "*i16", "text_group_count": "i32:16"}
        signature |= {"smiles_group_count": "i32:16", "text_stride": "i32", "smiles_stride": "i32"}
        yield Variant(
            name=f"token_interaction_coefficients[{dtype}]",
            kernel=coefficient_kernel,
            signature=signature | {"text_place_stride": "i32:16", "smiles_place_stride": "i32:16"},
            constants=dict(_COEFFICIENTS),
            options=launch_options(4, 1),
            tensor_cores=False,
        )
        signature = {"tokens": f"*{dtype}", "groups": "*i32", "scale": "*fp32", "gradient": "*fp32"}
        signature |= {"largest": "*fp32", "result": "*fp32", "group_count": "i32:16"}
        yield Variant(
            name=f"token_interaction_finish[{dtype}]",
            kernel=finish_kernel,
            signature=signature | {"width": "i32:16", "packed_width": "i32:16"},
            constants=dict(ROW_BLOCK),
            options=launch_options(8, 1),
            tensor_cores=False,
        )
    signature = {
        "groups": "*i32",
        "other_sequences": "*i32",
        "pairs": "*fp32",
        "value": "*fp32",
        "result": "*fp32",
    }
    sizes = {"group_count": "i32:16", "others": "i32", "own_stride": "i32", "other_stride": "i32"}
    yield Variant(
        name="token_interaction_weight",
        kernel=weight_kernel,
        signature=signature | sizes | {"value_stride": "i32:16"},
        constants=dict(_WEIGHT),
        options=launch_options(4, 1),
        tensor_cores=False,
    )
