"""Providers of the weighted token interaction, with the gradient of tokens and weights.

Other packages have one direction without weights: they are run twice, and compared with the unweighted sums.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import atomas_kernels
from atomas_kernels.bench.lengths import published_length
from atomas_kernels.bench.operators import Case, Operator, Prepared, Provider, compiled, grid
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


def _problem(case: Case, semantics: str = "masked") -> _Problem:
    generator = case.generator()
    lengths = (case.text_lengths, case.smiles_lengths)
    tokens = [torch.randn(int(n.sum()), case.shape["width"], generator=generator) for n in lengths]
    logits = [torch.randn(int(n.sum()), generator=generator) for n in lengths]
    if semantics == "unweighted":
        weights = [case.values(torch.ones(int(n.sum()))) for n in lengths]
    else:
        weights = [case.leaf(segment_softmax(x, n.cpu())) for x, n in zip(logits, lengths, strict=True)]
    text, smiles = (case.leaf(x) for x in tokens)
    return _Problem(text, smiles, weights[0], weights[1], *lengths)


def _exact(case: Case, semantics: str) -> Prepared:
    problem = _problem(case, semantics)
    return Prepared(lambda: reference(*problem), [x for x in problem[:4] if x.requires_grad])


def _ours(case: Case) -> Prepared:
    problem = _problem(case)
    return Prepared(lambda: atomas_kernels.token_interaction(*problem), list(problem[:4]))


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


def _pads(case: Case, *, published: bool) -> list[Padding]:
    length = published_length(case.shape["level"]) if published else None
    return [Padding.of(lengths, length=length) for lengths in (case.text_lengths, case.smiles_lengths)]


def _padded(operator: Callable[..., Tensor], *, published: bool = False) -> Callable[[Case], Prepared]:
    def build(case: Case) -> Prepared:
        problem = _problem(case)
        pads = _pads(case, published=published)
        masks = [pad.mask.to(problem.text.dtype) for pad in pads]

        def forward() -> Tensor:
            padded = [pad(values) for values, pad in zip(problem[:4], pads * 2, strict=True)]
            return operator(*padded, *masks)

        return Prepared(forward, list(problem[:4]))

    return build


def _needs(*, fwd: float, full: float, published: bool = False) -> Callable[[Case, str], float]:
    """Bytes of so many tensors [A, Bc, N_t, N_s], as counted on a batch that fits."""

    def needs(case: Case, kind: str) -> float:
        text, smiles = (pad.mask.numel() for pad in _pads(case, published=published))
        return (full if kind == "full" else fwd) * text * smiles * case.dtype.itemsize

    return needs


def _reference_needs(case: Case, kind: str) -> float:
    """The backward pass keeps the similarities of all tokens; tokens and their gradients come on top."""
    text, smiles = int(case.text_lengths.sum()), int(case.smiles_lengths.sum())
    return 4.0 * text * smiles + 24 * (text + smiles) * case.shape["width"] if kind == "full" else 0


def _flash_maxsim(case: Case) -> Prepared:
    score = importlib.import_module("flash_maxsim").flash_maxsim_batched_train

    def operator(text: Tensor, smiles: Tensor, *_: Tensor) -> Tensor:
        t, s = F.normalize(text, dim=-1), F.normalize(smiles, dim=-1)
        forth = score(t, s, doc_lengths=case.smiles_lengths, query_lengths=case.text_lengths)
        back = score(s, t, doc_lengths=case.text_lengths, query_lengths=case.smiles_lengths)
        return (forth + back.T) / 2

    return _unweighted(operator)(case)


def _late_interaction_kernels(case: Case) -> Prepared:
    score = importlib.import_module("late_interaction_kernels").maxsim

    def operator(text: Tensor, smiles: Tensor, text_mask: Tensor, smiles_mask: Tensor) -> Tensor:
        forth = score(text, smiles, text_mask, smiles_mask, normalize=True)
        back = score(smiles, text, smiles_mask, text_mask, normalize=True)
        return (forth + back.T) / 2

    return _unweighted(operator)(case)


def _unweighted(operator: Callable[..., Tensor]) -> Callable[[Case], Prepared]:
    def build(case: Case) -> Prepared:
        problem = _problem(case, "unweighted")
        pads = _pads(case, published=False)

        def forward() -> Tensor:
            padded = [pad(values) for values, pad in zip(problem[:2], pads, strict=True)]
            return operator(*padded, *(pad.mask for pad in pads)).float()

        return Prepared(forward, list(problem[:2]))

    return build


def _maxsim_cpu(case: Case) -> Prepared:
    """NumPy arrays of float32, one query at a time, no gradient."""
    score = importlib.import_module("maxsim_cpu").maxsim_scores_variable
    problem = _problem(case, "unweighted")
    sides = [
        [part.numpy() for part in F.normalize(tokens.detach().float(), dim=-1).split(lengths.tolist())]
        for tokens, lengths in ((problem.text, case.text_lengths), (problem.smiles, case.smiles_lengths))
    ]

    def forward() -> Tensor:
        forth, back = (
            torch.stack([torch.from_numpy(score(query, documents)) for query in queries])
            for queries, documents in (sides, sides[::-1])
        )
        return (forth + back.T) / 2

    return Prepared(forward, [])


def _flops(case: Case) -> tuple[float, float]:
    """One product of all tokens; its gradient is two."""
    tokens = float(case.text_lengths.sum()) * float(case.smiles_lengths.sum())
    return 2 * tokens * case.shape["width"], 4 * tokens * case.shape["width"]


OPERATOR = Operator(
    names=("token_interaction",),
    shapes={
        "smoke": grid(batch=[4], width=[64], level=[1]),
        "paper": [*grid(batch=[8, 32], width=[768], level=[0]), *grid(batch=[32], width=[768], level=[1, 2])],
        "scale": grid(batch=[64, 256, 1024], width=[768], level=[0]),
    },
    providers={
        "eager_padded": Provider(
            build=_padded(eager_padded, published=True),
            semantics="published",
            needs=_needs(fwd=2.8, full=3.0, published=True),
        ),
        "eager_masked": Provider(build=_padded(eager_masked), needs=_needs(fwd=3.0, full=4.7)),
        "compile_masked": Provider(
            build=_padded(compiled(eager_masked)), compiled=True, needs=_needs(fwd=2.0, full=2.0)
        ),
        "reference": Provider(build=_ours, backend="reference", needs=_reference_needs),
        "native": Provider(build=_ours, backend="native"),
        "triton": Provider(build=_ours, backend="triton"),
        "flash-maxsim": Provider(
            build=_flash_maxsim, semantics="unweighted", package="flash-maxsim", device="cuda"
        ),
        "late-interaction-kernels": Provider(
            build=_late_interaction_kernels,
            semantics="unweighted",
            package="late-interaction-kernels",
            device="cuda",
        ),
        "maxsim-cpu": Provider(
            build=_maxsim_cpu, semantics="unweighted", package="maxsim-cpu", device="cpu", crashes=True
        ),
    },
    exact=_exact,
    flops=_flops,
    has_maxima=True,
)
