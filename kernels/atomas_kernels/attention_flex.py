"""Packed T5 attention in one launch: FlexAttention, of which PyTorch generates a Triton kernel.

The mask says which tokens share a sequence, the score function adds the biases of distance and key. Compiled at the
first call, for sequences of any lengths. Gradients of the biases are summed with atomics: two runs differ in
rounding.
"""

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from atomas_kernels import checks
from atomas_kernels.reference import attention


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
    """See `atomas_kernels.packed_attention`. With dropout, which FlexAttention has not, the reference runs."""
    query_sizes = checks.segment_sizes("query_lengths", query_lengths, query.shape[0])
    key_sizes = checks.segment_sizes("key_lengths", key_lengths, key.shape[0])
    if dropout or not query_sizes or not any(key_sizes) or not any(query_sizes):
        return attention.packed_attention(
            query,
            key,
            value,
            query_lengths,
            key_lengths,
            distance_bias=distance_bias,
            key_bias=key_bias,
            causal=causal,
            dropout=dropout,
        )
    places = _places(tuple(query_sizes), tuple(key_sizes), causal, query.device)

    def biased(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if distance_bias is not None:
            reach = distance_bias.shape[1] // 2
            distance = places.key[j] - places.query[i]
            score = score + distance_bias[head, distance.clamp(-reach, reach) + reach]
        return score if key_bias is None else score + key_bias[j]

    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    plain = distance_bias is None and key_bias is None
    attended: Any = _flex(query.device.type)(
        q, k, v, score_mod=None if plain else biased, block_mask=places.mask, scale=1.0
    )
    return attended[0].transpose(0, 1)


class _Places(NamedTuple):
    """What the kernel reads besides the tokens."""

    query: Tensor
    """[T_q] int64, place of each query within its sequence."""
    key: Tensor
    """[T_k] int64"""
    mask: BlockMask


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _places(
    query_sizes: tuple[int, ...], key_sizes: tuple[int, ...], causal: bool, device: torch.device
) -> _Places:
    """All layers of a model share it."""
    (query_row, query_place), (key_row, key_place) = (
        _rows_and_places(sizes, device) for sizes in (query_sizes, key_sizes)
    )

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = query_row[i] == key_row[j]
        return same & (key_place[j] <= query_place[i]) if causal else same

    mask = create_block_mask(visible, None, None, len(query_row), len(key_row), device=str(device))
    return _Places(query_place, key_place, mask)


def _rows_and_places(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """[T] int64 each: the sequence of every token, and its place there."""
    lengths = torch.tensor(sizes)
    rows = torch.repeat_interleave(torch.arange(len(sizes)), lengths)
    places = torch.arange(len(rows)) - (lengths.cumsum(0) - lengths)[rows]
    return rows.to(device), places.to(device)


@cache
def _flex(device_type: str) -> Any:
    """Uncompiled it would hold all logits; on the CPU, where it only serves the tests, that is well."""
    return flex_attention if device_type == "cpu" else torch.compile(flex_attention, dynamic=True)
