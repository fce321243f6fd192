"""Providers of the weighted token interaction, with the gradient of tokens and weights."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atomas_kernels.bench.harness import Case, Provider
from atomas_kernels.bench.padding import Padding
from atomas_kernels.reference.interaction import token_interaction as reference
from atomas_kernels.reference.segments import segment_softmax


class _Problem(NamedTuple):
    text: Tensor
    smiles: Tensor
    text_weight: Tensor
    smiles_weight: Tensor
    text_lengths: Tensor
    smiles_lengths: Tensor


def _problem(case: Case) -> _Problem:
    generator = torch.Generator().manual_seed(case.seed)
    lengths = (case.text_lengths, case.smiles_lengths)
    tokens = [torch.randn(int(n.sum()), case.width, generator=generator) for n in lengths]
    logits = [torch.randn(int(n.sum()), generator=generator) for n in lengths]
    weights = [segment_softmax(x, n) for x, n in zip(logits, lengths, strict=True)]
    text, smiles, w, v = (case.leaf(x) for x in (*tokens, *weights))
    return _Problem(text, smiles, w, v, *lengths)


def _ragged(operator: Callable[..., Tensor]) -> Provider:
    def build(case: Case) -> tuple[Callable[[], Tensor], list[Tensor]]:
        problem = _problem(case)
        return lambda: operator(*problem), list(problem[:4])

    return Provider(build=build)


def _native(*arguments: Tensor) -> Tensor:
    from atomas_kernels.native import token_interaction

    return token_interaction(*arguments)


def eager_padded(
    text: Tensor, smiles: Tensor, w: Tensor, v: Tensor, text_mask: Tensor, smiles_mask: Tensor
) -> Tensor:
    """The published form: every sequence padded to 512, padding multiplied with 0 in the similarities."""
    similarity = torch.einsum("atd,bsd->abts", F.normalize(text, dim=-1), F.normalize(smiles, dim=-1))
    similarity = torch.einsum("abts,at->abts", similarity, text_mask)
    similarity = torch.einsum("abts,bs->abts", similarity, smiles_mask)
    text_to_smiles = torch.einsum("abt,at->ab", similarity.max(dim=-1).values, w)
    smiles_to_text = torch.einsum("abs,bs->ab", similarity.max(dim=-2).values, v)
    return (text_to_smiles + smiles_to_text) / 2


def eager_masked(
    text: Tensor, smiles: Tensor, w: Tensor, v: Tensor, text_mask: Tensor, smiles_mask: Tensor
) -> Tensor:
    """Padded to the longest sequence of the batch, -inf at padding."""
    similarity = torch.einsum("atd,bsd->abts", F.normalize(text, dim=-1), F.normalize(smiles, dim=-1))
    rows = similarity.masked_fill(~smiles_mask[None, :, None, :].bool(), -torch.inf).amax(dim=3)
    columns = similarity.masked_fill(~text_mask[:, None, :, None].bool(), -torch.inf).amax(dim=2)
    return (torch.einsum("abt,at->ab", rows, w) + torch.einsum("abs,bs->ab", columns, v)) / 2


def _padded(operator: Callable[..., Tensor], *, published: bool = False, compiled: bool = False) -> Provider:
    def build(case: Case) -> tuple[Callable[[], Tensor], list[Tensor]]:
        problem = _problem(case)
        pads = [Padding.of(lengths, published=published) for lengths in problem[4:]]
        masks = [pad.mask.to(case.dtype) for pad in pads]
        run = torch.compile(operator, dynamic=False) if compiled else operator

        def forward() -> Tensor:
            padded = [pad(values) for values, pad in zip(problem[:4], pads * 2, strict=True)]
            return run(*padded, *masks)

        return forward, list(problem[:4])

    return Provider(build=build, ragged=not published)


PROVIDERS = {
    "eager_padded": _padded(eager_padded, published=True),
    "eager_masked": _padded(eager_masked),
    "compile_masked": _padded(eager_masked, compiled=True),
    "reference": _ragged(reference),
    "native": _ragged(_native),
}
