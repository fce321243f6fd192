"""Weighted token interaction of all pairs on a GPU, both directions in one product (method.md 3.2).

Limits. For T_t text and T_s SMILES tokens of width D the forward pass does 2 T_t T_s D floating-point operations,
the backward pass twice as many (three times where the matches are recomputed). Tokens are read once from memory and
scores and matches are small, so both are bound by the tensor cores: 256 pairs with the lengths of ChEBI-20 (28,000
text and 19,000 SMILES tokens) at D = 768 are 0.8 TFLOP, 1 ms forward and 2 ms backward at 790 TFLOP/s. What comes on
top there: groups of 16 rows pad the work by a fifth; the keys are half a byte per similarity, written and read once
(0.15 ms at 4 TB/s); the coefficients of the backward pass are 2 bytes, written once (0.3 ms) and read twice under the
products. A tile of 128 x 128 needs a byte from the second-level cache for 64 operations, 9 TB/s at 600 TFLOP/s: hence
large tiles, and the order in which they are computed. Below about 30 pairs a GPU is not full and launches dominate.

Memory. Workspaces are at most 512 MiB (or what one SMILES needs with all text): beyond that the SMILES are taken in
parts, in order. Matches are 6 bytes for every (token, sequence of the other side); where they would exceed 2 GiB they
are not kept, and the backward pass computes each part's matches again.

The host waits for the device once in the forward pass, to check the lengths, and in the backward pass only if there
is more than one part.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import custom_op

from atomas_kernels import checks
from atomas_kernels.triton import interaction_backward as backward
from atomas_kernels.triton import interaction_forward as forward
from atomas_kernels.triton.interaction_forward import Matches
from atomas_kernels.triton.packing import GROUP, Packed, pack, packed_rows

_WORKSPACE_BYTES = 512 * 2**20
_MATCH_BYTES = 2 * 2**30
_EXPONENT = 0x7F800000
"""Bits of a float32 that are its power of two."""
_LONGEST = 2**15 - 1
"""Places are kept as int16."""


def token_interaction(
    text: Tensor,
    smiles: Tensor,
    text_weight: Tensor,
    smiles_weight: Tensor,
    text_lengths: Tensor,
    smiles_lengths: Tensor,
) -> Tensor:
    """See `atomas_kernels.token_interaction`. Sequences of up to 32767 tokens; maxima that differ by less than 2^-26
    are equal. Products of float32 tokens are tf32 in three parts, close to float32.
    """
    leaves = (text, smiles, text_weight, smiles_weight)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
    inputs = (text.contiguous(), smiles.contiguous(), text_weight.float(), smiles_weight.float())
    scores: Tensor = _interaction(*(x.contiguous() for x in inputs), text_lengths, smiles_lengths, wanted)[0]
    return scores


@custom_op("atomas_kernels::triton_interaction", mutates_args=())
def _interaction(
    text: Tensor,
    smiles: Tensor,
    text_weight: Tensor,
    smiles_weight: Tensor,
    text_lengths: Tensor,
    smiles_lengths: Tensor,
    with_matches: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scores [A, Bc], then the matches of text and of SMILES, all empty unless `with_matches` and they are not too
    large.
    """
    lengths = torch.cat((text_lengths, smiles_lengths)).cpu()
    on_host = lengths.split([len(text_lengths), len(smiles_lengths)])
    for name, sizes, tokens in zip(("text_lengths", "smiles_lengths"), on_host, (text, smiles), strict=True):
        if max(checks.segment_sizes(name, sizes, len(tokens)), default=0) > _LONGEST:
            raise ValueError(f"{name}: the Triton backend takes sequences of up to {_LONGEST} tokens")
    outputs = _empty_outputs(text, smiles, text_lengths, smiles_lengths, with_matches)
    scores = outputs[0]
    if not (len(text) and len(smiles)):
        scores.zero_()
        return outputs
    matches = _Matches(Matches(*outputs[1:3]), Matches(*outputs[3:])) if outputs[1].numel() else None
    packed = pack(text, text_weight, text_lengths)
    for part in _parts(packed, smiles, smiles_weight, smiles_lengths, on_host[1], 2 * _WORKSPACE_BYTES):
        own = None if matches is None else matches.of(part)
        scores[:, part.sequences] = _score(packed, part.packed, own)
    return outputs


@_interaction.register_fake
def _(
    text: Tensor,
    smiles: Tensor,
    text_weight: Tensor,
    smiles_weight: Tensor,
    text_lengths: Tensor,
    smiles_lengths: Tensor,
    with_matches: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(text, smiles, text_lengths, smiles_lengths, with_matches)


def _empty_outputs(
    text: Tensor, smiles: Tensor, text_lengths: Tensor, smiles_lengths: Tensor, with_matches: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    texts, molecules = len(text_lengths), len(smiles_lengths)
    text_rows, smiles_rows = packed_rows(len(text), texts), packed_rows(len(smiles), molecules)
    scores = text.new_empty(texts, molecules, dtype=torch.float32)
    if not with_matches or 6 * (molecules * text_rows + texts * smiles_rows) > _MATCH_BYTES:
        text_rows = smiles_rows = molecules = texts = 0
    return (
        scores,
        *forward.new_matches(text_rows, molecules, text.device),
        *forward.new_matches(smiles_rows, texts, text.device),
    )


@custom_op("atomas_kernels::triton_interaction_backward", mutates_args=())
def _interaction_backward(
    grad_scores: Tensor,
    text: Tensor,
    smiles: Tensor,
    text_weight: Tensor,
    smiles_weight: Tensor,
    text_lengths: Tensor,
    smiles_lengths: Tensor,
    text_value: Tensor,
    text_place: Tensor,
    smiles_value: Tensor,
    smiles_place: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first four inputs of `_interaction`, float32; autograd rounds those of half-precision tokens."""
    inputs = (text, smiles, text_weight, smiles_weight)
    if not (len(text) and len(smiles)):
        return tuple(torch.zeros_like(x, dtype=torch.float32) for x in inputs)  # type: ignore[return-value]
    # In units of the largest, float16 holds the coefficients: of the power of two in it, so that what they are rounded
    # to does not depend on which other scores are in the block.
    largest = grad_scores.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    largest = (largest.view(torch.int32) & _EXPONENT).view(torch.float32)
    pairs = grad_scores / largest
    kept = _Matches(Matches(text_value, text_place), Matches(smiles_value, smiles_place))
    packed = pack(text, text_weight, text_lengths)
    text_gradient: Tensor | None = None
    grad_text_weight = torch.zeros_like(text_weight)
    grad_smiles = torch.empty_like(smiles, dtype=torch.float32)
    grad_smiles_weight = torch.empty_like(smiles_weight)
    entries = _WORKSPACE_BYTES // text.element_size()
    for part in _parts(packed, smiles, smiles_weight, smiles_lengths, smiles_lengths, entries):
        matches = kept.of(part) if text_value.numel() else _computed_matches(packed, part.packed)
        own = pairs[:, part.sequences]
        c = backward.coefficients(packed, part.packed, own, matches.text.place, matches.smiles.place)
        gradient = backward.product(c, packed, part.packed)
        text_gradient = gradient if text_gradient is None else text_gradient.add_(gradient)
        gradient = backward.product(c.T, part.packed, packed)
        grad_smiles[part.tokens] = backward.finish(smiles[part.tokens], part.packed, gradient, largest)

        own = grad_scores[:, part.sequences]
        grad_text_weight += backward.weight_gradient(packed, part.packed, own, matches.text.value, len(text))
        grad_smiles_weight[part.tokens] = backward.weight_gradient(
            part.packed, packed, own.T, matches.smiles.value, len(smiles[part.tokens])
        )
    assert text_gradient is not None
    grad_text = backward.finish(text, packed, text_gradient, largest)
    return grad_text, grad_smiles, grad_text_weight, grad_smiles_weight


@_interaction_backward.register_fake
def _(grad_scores: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, dtype=torch.float32) for x in tensors[:4])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], *output[1:])


def _gradient(ctx: Any, grad_scores: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *_interaction_backward(grad_scores, *ctx.saved_tensors), None, None, None


_interaction.register_autograd(_gradient, setup_context=_setup)


class _Part(NamedTuple):
    """Some consecutive SMILES."""

    sequences: slice
    tokens: slice
    rows: slice
    """In the packing of all SMILES."""
    packed: Packed


class _Matches(NamedTuple):
    """Of text among SMILES, and of SMILES among text."""

    text: Matches
    smiles: Matches

    def of(self, part: _Part) -> "_Matches":
        """Those with the SMILES of `part`."""
        text = Matches(*(x[part.sequences] for x in self.text))
        return _Matches(text, Matches(*(x[:, part.rows] for x in self.smiles)))


def _score(text: Packed, smiles: Packed, matches: _Matches | None) -> Tensor:
    """Scores [texts, SMILES]; writes the matches if there are any."""
    text_keys, smiles_keys = forward.similarity_keys(text, smiles)
    halves = torch.empty(2, text.count, smiles.count, device=text.tokens.device)
    forward.match(text_keys, text, smiles, halves[0], None if matches is None else matches.text)
    forward.match(smiles_keys, smiles, text, halves[1].T, None if matches is None else matches.smiles)
    return halves[0] + halves[1]


def _computed_matches(text: Packed, smiles: Packed) -> _Matches:
    device = text.tokens.device
    matches = _Matches(
        forward.new_matches(text.rows, smiles.count, device),
        forward.new_matches(smiles.rows, text.count, device),
    )
    _score(text, smiles, matches)
    return matches


def _parts(
    text: Packed, smiles: Tensor, weight: Tensor, lengths: Tensor, sizes: Tensor, similarities: int
) -> Iterator[_Part]:
    """SMILES packed in parts of at most so many similarities with all text, but of at least one sequence; `sizes`
    are the lengths again, where reading them costs least.
    """
    limit = similarities // text.rows
    if packed_rows(len(smiles), len(lengths)) <= limit:
        everything = slice(None)
        yield _Part(everything, everything, everything, pack(smiles, weight, lengths))
        return
    count: list[int] = sizes.tolist()
    sequence = token = row = 0
    while sequence < len(count):
        end, tokens, rows = sequence, 0, 0
        while end < len(count) and (
            end == sequence or packed_rows(tokens + count[end], end + 1 - sequence) <= limit
        ):
            tokens += count[end]
            rows += triton.cdiv(count[end], GROUP.value) * GROUP.value
            end += 1
        here, there = slice(sequence, end), slice(token, token + tokens)
        packed = pack(smiles[there], weight[there], lengths[here])
        yield _Part(here, there, slice(row, row + rows), packed)
        sequence, token, row = end, token + tokens, row + rows
