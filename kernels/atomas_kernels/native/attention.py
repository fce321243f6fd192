"""T5 attention over packed sequences (csrc/cpu/attention.cpp): neither logits nor dropout masks are kept.

The backward pass makes them again, a few queries at a time. Half precision is widened to float32 and rounded once.
"""

from typing import Any

from torch import Tensor
from torch.library import custom_op

from atomas_kernels import _native, checks
from atomas_kernels.native import machine
from atomas_kernels.native.dropout import draw_seed, rule


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_lengths: Tensor,
    key_lengths: Tensor,
    *,
    distance_bias: Tensor | None,
    key_bias: Tensor | None,
    causal: bool,
    dropout: float,
) -> Tensor:
    """See `atomas_kernels.packed_attention`. The rate of dropout is rounded to a multiple of 2^-32.

    Which weights are dropped follows from one number of torch's generator.
    """
    seed = draw_seed() if dropout else 0
    attended: Tensor = _attention(
        *(_rows(x) for x in (query, key, value)),
        query_lengths,
        key_lengths,
        None if distance_bias is None else machine.single(distance_bias),
        None if key_bias is None else machine.single(key_bias),
        causal,
        dropout,
        seed,
    )[0]
    return attended.to(query.dtype)


def _rows(heads: Tensor) -> Tensor:
    """[T, H, d] float32, in which the heads of a token are neighbours."""
    heads = heads.float()
    return heads if heads.stride()[1:] == (heads.shape[2], 1) else heads.contiguous()


@custom_op("atomas_kernels::packed_attention", mutates_args=(), device_types="cpu")
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_lengths: Tensor,
    key_lengths: Tensor,
    distance_bias: Tensor | None,
    key_bias: Tensor | None,
    causal: bool,
    dropout: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """[T_q, H, d], and the logarithms of the denominators [T_q, H]."""
    outputs = _empty_outputs(query)
    problem = _problem(
        query, key, value, query_lengths, key_lengths, distance_bias, key_bias, causal, dropout, seed
    )
    _native.attention_forward(*problem, *(x.data_ptr() for x in outputs))
    return outputs


def _empty_outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:2])


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_lengths: Tensor,
    key_lengths: Tensor,
    distance_bias: Tensor | None,
    key_bias: Tensor | None,
    causal: bool,
    dropout: float,
    seed: int,
) -> tuple[Any, ...]:
    """The first arguments of both kernels."""
    heads, width = query.shape[1:]
    reach = 0 if distance_bias is None else distance_bias.shape[1] // 2
    return (
        machine.instruction_set,
        machine.threads(),
        (heads, width, reach, causal),
        rule(dropout, seed),
        checks.segment_sizes("query_lengths", query_lengths, query.shape[0]),
        checks.segment_sizes("key_lengths", key_lengths, key.shape[0]),
        *((x.data_ptr(), x.stride(0)) for x in (query, key, value)),
        *(0 if x is None else x.data_ptr() for x in (distance_bias, key_bias)),
    )


@_attention.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(query)


@custom_op("atomas_kernels::packed_attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    grad_output: Tensor,
    output: Tensor,
    normalizer: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_lengths: Tensor,
    key_lengths: Tensor,
    distance_bias: Tensor | None,
    key_bias: Tensor | None,
    causal: bool,
    dropout: float,
    seed: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, distance bias and key bias; the last two are empty where not wanted."""
    gradients = _empty_gradients(query, key, value, distance_bias, wanted)
    problem = _problem(
        query, key, value, query_lengths, key_lengths, distance_bias, key_bias, causal, dropout, seed
    )
    _native.attention_backward(
        *problem,
        (output.data_ptr(), output.stride(0)),
        (grad_output.data_ptr(), grad_output.stride(0)),
        normalizer.data_ptr(),
        *(x.data_ptr() for x in gradients[:3]),
        *(x.data_ptr() if asked else 0 for x, asked in zip(gradients[3:], wanted, strict=True)),
    )
    of_query, of_key, of_value, of_distances, of_key_bias = gradients
    return of_query, of_key, of_value, of_distances, of_key_bias.sum(dim=1)


def _empty_gradients(
    query: Tensor, key: Tensor, value: Tensor, distance_bias: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    of_distances, of_keys = wanted
    return (
        query.new_empty(query.shape),
        query.new_empty(key.shape),
        query.new_empty(value.shape),
        query.new_empty(distance_bias.shape if of_distances and distance_bias is not None else (0, 0)),
        query.new_empty(key.shape[:2] if of_keys else (0, 0)),
    )


@_attention_backward.register_fake
def _(
    grad_output: Tensor,
    output: Tensor,
    normalizer: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_lengths: Tensor,
    key_lengths: Tensor,
    distance_bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    of_query, of_key, of_value, of_distances, of_key_bias = _empty_gradients(
        query, key, value, distance_bias, rest[-1]
    )
    return of_query, of_key, of_value, of_distances, of_key_bias.sum(dim=1)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:7])
    ctx.rest = inputs[7:]


def _gradient(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *of_rows, of_distances, of_keys = _attention_backward(
        _rows(grad_output), *ctx.saved_tensors, *ctx.rest, [bool(x) for x in ctx.needs_input_grad[5:7]]
    )
    biases = (of_distances, of_keys)
    wanted = ctx.needs_input_grad[5:7]
    return (
        *of_rows, None, None, *(x if asked else None for x, asked in zip(biases, wanted, strict=True)),
        None, None, None,
    )  # fmt: skip


_attention.register_autograd(_gradient, setup_context=_setup)
