"""Token interaction in the interpreter, on CPU tensors; run by test_triton_interaction.py with TRITON_INTERPRET=1.

Only float32 and float16: the interpreter's arithmetic on bfloat16 is wrong.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear

from atomas_kernels.reference import contrastive, interaction, segments
from atomas_kernels.triton import interaction as triton_interaction
from atomas_kernels.triton.interaction import token_interaction

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


def _problem(texts: list[int], molecules: list[int], width: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text_lengths, smiles_lengths = (torch.tensor(x, dtype=torch.int64) for x in (texts, molecules))
    text, smiles = (torch.randn(sum(x), width, generator=generator) for x in (texts, molecules))
    w, v = (torch.rand(sum(x), generator=generator) for x in (texts, molecules))
    return [text, smiles, w, v, text_lengths, smiles_lengths]


def _with_gradients(
    operator: Callable[..., Tensor], problem: list[Tensor], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in problem[:4]]
    scores = operator(*leaves, *problem[4:])
    upstream = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1)).to(scores.dtype)
    return [scores, *torch.autograd.grad((scores * upstream).sum(), leaves)]


def _assert_near(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(got, expected, strict=True):
        scale = max(b.abs().max().item(), 1e-3) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b.double(), atol=tolerance * scale, rtol=0)


def _assert_is_the_reference(problem: list[Tensor]) -> None:
    got = _with_gradients(token_interaction, problem)
    _assert_near(got, _with_gradients(interaction.token_interaction, problem, torch.float64), 2e-6)


def _whole(problem: list[Tensor]) -> list[Tensor]:
    """With tokens of small whole numbers, whose products are exact: the interpreter's matrix product rounds by the
    place in the tile, as no GPU does.
    """
    return [*((3 * x).round() for x in problem[:2]), *problem[2:]]


@pytest.mark.parametrize(
    ("texts", "molecules", "width"),
    [
        ([1, 0, 2, 15, 16, 17], [33, 1, 0], 24),  # groups
        ([63, 64, 65], [31, 127, 129, 2], 16),  # tiles of rows
        ([129], [257], 130),  # tiles of every kind, and a width of more than one step
        ([512, 5], [20], 16),
        ([3], [512, 9], 16),
        ([7], [4, 2, 9, 1, 5, 30, 2, 8, 3, 11], 20),  # more sequences than one program takes
        ([0, 0], [3], 8),
        ([2], [0], 8),
        ([], [4, 1], 8),
        ([], [], 8),
    ],
)
def test_token_interaction_is_the_reference(texts: list[int], molecules: list[int], width: int) -> None:
    _assert_is_the_reference(_problem(texts, molecules, width))


def test_random_lengths() -> None:
    generator = torch.Generator().manual_seed(0)
    texts, molecules = (torch.randint(0, 50, (n,), generator=generator).tolist() for n in (4, 5))
    _assert_is_the_reference(_problem(texts, molecules, 21))


def test_half_precision_is_computed_in_single() -> None:
    problem = _problem([20, 5], [9, 34], 32)
    # Tiny and huge tokens: only their directions count.
    problem[0][3] *= 1e-3
    problem[1][5] *= 1e3
    problem[:4] = [x.half() for x in problem[:4]]
    got = _with_gradients(token_interaction, problem, torch.float16)
    assert [x.dtype for x in got] == [torch.float32, *[torch.float16] * 4]
    expected = _with_gradients(interaction.token_interaction, problem, torch.float64)
    _assert_near(got[:1], expected[:1], 1e-6)
    _assert_near(got[1:], expected[1:], 2e-3)
    assert (got[2][5].double() - expected[2][5]).abs().max() <= 0.02 * expected[2][5].abs().max()


def test_leaves_of_half_precision_may_have_single_gradients_which_do_not_depend_on_the_block() -> None:
    """Ranks and tiles sum what each of them finds: a coefficient must be rounded to the same in each."""
    problem = _problem([20, 5], [9, 34], 32)
    problem[:2] = [(3 * x).round().half() for x in problem[:2]]
    upstream = torch.tensor([[3.7, 0.011], [-1.9, 0.017]])

    def gradients(part: slice) -> list[Tensor]:
        ends = problem[5].cumsum(0)
        tokens = slice(int(ends[part][0] - problem[5][part][0]), int(ends[part][-1]))
        leaves = [problem[0], problem[1][tokens], problem[2], problem[3][tokens]]
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        for leaf in leaves[:2]:
            leaf.grad_dtype = torch.float32
        scores = token_interaction(*leaves, problem[4], problem[5][part])
        return list(torch.autograd.grad(scores, leaves, upstream[:, part]))

    whole, first, second = gradients(slice(0, 2)), gradients(slice(0, 1)), gradients(slice(1, 2))
    assert [x.dtype for x in whole] == [torch.float32] * 4
    parts = [first[0] + second[0], torch.cat([first[1], second[1]])]
    _assert_near(parts, whole[:2], 1e-6)


def test_duplicated_tokens_give_the_gradient_to_the_first() -> None:
    text = _whole(_problem([40], [1], 20))[0]
    smiles = text[3].repeat(35, 1).requires_grad_()
    lengths = torch.tensor([40]), torch.tensor([35])
    scores = token_interaction(text, smiles, torch.ones(40) / 40, torch.zeros(35), *lengths)
    scores.sum().backward()
    assert smiles.grad is not None
    assert smiles.grad[0].any()
    assert not smiles.grad[1:].any()


def test_exact_ties_go_to_the_lowest_index() -> None:
    # Tokens along the axes: every similarity is 0 or 1 or -1 and most maxima are shared.
    problem = _problem([40, 21], [35, 19], 4)
    generator = torch.Generator().manual_seed(0)
    for i in (0, 1):
        axes = torch.randint(0, 4, (len(problem[i]),), generator=generator)
        signs = torch.randint(0, 2, (len(problem[i]), 1), generator=generator) * 2.0 - 1
        problem[i] = torch.eye(4)[axes] * signs
    _assert_is_the_reference(problem)


def test_tokens_without_weight_or_length() -> None:
    problem = _problem([17, 4], [20, 3], 12)
    problem[2][:17] = 0
    problem[3][:20] = 0
    problem[0][2] = 0
    problem[1][21] = 1e-14
    got = _with_gradients(token_interaction, problem)
    _assert_near(got, _with_gradients(interaction.token_interaction, problem, torch.float64), 2e-6)
    assert not got[1][2].any()
    assert not got[2][21].any()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_non_finite_token_stays_in_its_sequence(poison: float) -> None:
    problem = _problem([3, 2], [4, 0, 5], 8)
    clean = _with_gradients(token_interaction, problem)
    problem[0][1, 3] = poison
    problem[1][8, 0] = poison
    got = _with_gradients(token_interaction, problem)
    assert got[0].isnan().tolist() == [[True, False, True], [False, False, True]]
    assert torch.equal(got[0][1, :2], clean[0][1, :2])
    assert bool(got[1][1].isnan().all())
    assert bool(got[1][3:].isfinite().all())


def test_the_order_of_the_batch_does_not_matter() -> None:
    texts, molecules = [33, 7, 18, 1], [16, 40, 3]
    problem = _whole(_problem(texts, molecules, 24))
    rows, columns = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0])
    parts = [x.split(sizes) for x, sizes in zip(problem[:4], (texts, molecules) * 2, strict=True)]
    moved = [
        torch.cat([part[i] for i in order]) for part, order in zip(parts, (rows, columns) * 2, strict=True)
    ]
    scores = token_interaction(*problem)
    again = token_interaction(*moved, problem[4][rows], problem[5][columns])
    assert torch.equal(again, scores[rows][:, columns])


def test_a_score_does_not_depend_on_the_batch_around_it_and_repeats() -> None:
    texts, molecules = [33, 7, 90], [16, 3, 70]
    problem = _whole(_problem(texts, molecules, 40, 3))
    first, second = (_with_gradients(token_interaction, problem) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    text, smiles, w, v = (x.split(n) for x, n in zip(problem[:4], (texts, molecules) * 2, strict=True))
    for a, b in ((0, 2), (1, 0), (2, 1)):
        lengths = problem[4][a : a + 1], problem[5][b : b + 1]
        assert token_interaction(text[a], smiles[b], w[a], v[b], *lengths).item() == first[0][a, b].item()


@pytest.mark.parametrize("kept", [True, False])
def test_parts_and_recomputed_matches(monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    problem = _problem([20, 3], [20, 0, 250, 9], 16)
    whole = token_interaction(*problem)
    parts = []
    pack = triton_interaction.pack
    monkeypatch.setattr(triton_interaction, "pack", lambda *x: parts.append(len(x[0])) or pack(*x))
    monkeypatch.setattr(triton_interaction, "_WORKSPACE_BYTES", 4 * 256 * 256)
    if not kept:
        monkeypatch.setattr(triton_interaction, "_MATCH_BYTES", 0)
    assert torch.equal(token_interaction(*problem), whole)
    assert parts == [23, 279]
    parts.clear()
    _assert_is_the_reference(problem)
    assert parts[-4:] == [23, 20, 250, 9]


def test_what_the_workspace_costs_is_not_kept() -> None:
    problem = _problem([20, 3], [9], 8)
    scores, *matches = triton_interaction._interaction(*problem, False)
    assert not sum(x.numel() for x in matches)
    again, *matches = triton_interaction._interaction(*problem, True)
    assert [x.dtype for x in matches] == [torch.float32, torch.int16] * 2
    assert torch.equal(scores, again)


def test_bad_input_is_named() -> None:
    problem = _problem([6, 3], [4], 4)
    with pytest.raises(ValueError, match=r"^text_lengths: "):
        token_interaction(*problem[:4], problem[4] + 1, problem[5])
    with pytest.raises(ValueError, match=r"^smiles_lengths: negative"):
        token_interaction(*problem[:5], torch.tensor([5, -1]))
    with pytest.raises(ValueError, match=r"^smiles_lengths: .*32767"):
        token_interaction(*_problem([1], [40000], 1))


def test_the_operator_is_well_formed_for_torch() -> None:
    problem = _problem([5, 0, 6], [7, 3], 8)
    leaves = [x.requires_grad_() for x in problem[:4]]
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (*leaves, *problem[4:], True)
    torch.library.opcheck(triton_interaction._interaction, arguments, test_utils=utilities)


@pytest.mark.parametrize("number", range(3))
def test_golden_numbers(golden: Path, number: int) -> None:
    prefix = f"case{number}."
    file = load_file(golden / "token_interaction.safetensors")
    case = {name.removeprefix(prefix): x for name, x in file.items() if name.startswith(prefix)}
    leaves = {name: x.clone().requires_grad_() for name, x in case.items() if f"grad_{name}" in case}
    flat, lengths, weight = {}, {}, {}
    for side in ("text", "smiles"):
        batch, n, width = leaves[side].shape
        flat[side], lengths[side] = leaves[side].reshape(-1, width), torch.full((batch,), n)
        first, bias, second, offset = (
            leaves[f"{side}_weight.{name}"] for name in ("0.weight", "0.bias", "2.weight", "2.bias")
        )
        logits = linear(linear(flat[side], first, bias).relu(), second, offset).squeeze(-1)
        weight[side] = segments.segment_softmax(logits, lengths[side])
    scores = token_interaction(
        flat["text"], flat["smiles"], weight["text"], weight["smiles"], lengths["text"], lengths["smiles"]
    )
    torch.testing.assert_close(scores, case["logits"], atol=1e-6, rtol=1e-5)
    contrastive.info_nce(scores, leaves["scale"].view(1), negative_mask=None).backward()
    for name, leaf in leaves.items():
        expected = case[f"grad_{name}"]
        assert leaf.grad is not None
        deviation = (leaf.grad - expected).abs().max() / expected.abs().max().clamp(min=1e-4)
        assert deviation < 1e-3, name
