"""The compiled CPU module against the reference, on every instruction set that this machine runs."""

import importlib
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import atomas_kernels as ak
from atomas_kernels.reference import clustering, interaction

native = pytest.importorskip("atomas_kernels.native", reason="the native module is not built")
machine = importlib.import_module("atomas_kernels.native.machine")
native_interaction = importlib.import_module("atomas_kernels.native.interaction")
native_clustering = importlib.import_module("atomas_kernels.native.clustering")

# Below, at and above the tiles (6 and 12 rows; 8, 16 and 32 columns) and the block of text tokens (128).
EDGES = [0, 1, 2, 5, 6, 7, 11, 12, 13, 15, 16, 17, 31, 32, 33, 64, 127, 128, 129]
SIZES = st.lists(st.sampled_from(EDGES[:-3]), min_size=0, max_size=4)
WIDTHS = st.sampled_from([1, 3, 8, 17, 64, 65])


@pytest.fixture(params=machine._native.instruction_sets(), scope="module")
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    best = machine.instruction_set
    machine.instruction_set = request.param
    yield request.param
    machine.instruction_set = best


def _problem(texts: list[int], molecules: list[int], width: int, seed: int) -> list[Tensor]:
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


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=SIZES, molecules=SIZES, width=WIDTHS, seed=st.integers(0, 99))
def test_token_interaction_is_the_reference(
    instruction_set: str, texts: list[int], molecules: list[int], width: int, seed: int
) -> None:
    problem = _problem(texts, molecules, width, seed)
    if width == 1:
        # Unit tokens of width 1 are all +-1: exact ties, whose gradients through the norm vanish.
        expected = interaction.token_interaction(*problem)
        torch.testing.assert_close(native.token_interaction(*problem), expected, atol=1e-4, rtol=1e-5)
        return
    _assert_near(
        _with_gradients(native.token_interaction, problem),
        _with_gradients(interaction.token_interaction, problem, torch.float64),
        2e-5,
    )


@pytest.mark.parametrize("size", EDGES)
def test_token_interaction_at_the_tiles_edges(instruction_set: str, size: int) -> None:
    problem = _problem([size, 3, size], [7, size, 2], 24, size)
    _assert_near(
        _with_gradients(native.token_interaction, problem),
        _with_gradients(interaction.token_interaction, problem, torch.float64),
        2e-5,
    )


def test_token_interaction_over_several_blocks(instruction_set: str) -> None:
    problem = _problem([300, 90, 200, 40], [600, 10, 530, 70], 16, 0)
    _assert_near(
        _with_gradients(native.token_interaction, problem),
        _with_gradients(interaction.token_interaction, problem, torch.float64),
        2e-5,
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 5e-3)])
def test_half_precision_is_computed_in_single(dtype: torch.dtype, tolerance: float) -> None:
    problem = _problem([20, 5], [9, 14], 32, 0)
    problem[:2] = [x.to(dtype) for x in problem[:2]]
    got = _with_gradients(native.token_interaction, problem, dtype)
    assert [x.dtype for x in got] == [torch.float32, *[dtype] * 4]
    _assert_near(got, _with_gradients(interaction.token_interaction, problem, torch.float64), tolerance)


def test_equal_tokens_give_the_gradient_to_the_first(instruction_set: str) -> None:
    generator = torch.Generator().manual_seed(0)
    text, token = torch.randn(40, 70, generator=generator), torch.randn(70, generator=generator)
    smiles = token.repeat(35, 1).requires_grad_()
    ones = torch.ones(40) / 40
    nothing = torch.zeros(35)
    scores = native.token_interaction(text, smiles, ones, nothing, torch.tensor([40]), torch.tensor([35]))
    scores.sum().backward()
    assert smiles.grad is not None
    assert smiles.grad[0].any()
    assert not smiles.grad[1:].any()


def test_zero_token_has_no_similarity_and_no_gradient(each_backend: str) -> None:
    problem = _problem([3, 2], [4], 8, 0)
    problem[0][1] = 0
    scores, grad_text, *_ = _with_gradients(ak.token_interaction, problem)
    assert bool(scores.isfinite().all())
    assert not grad_text[1].any()
    assert grad_text[0].any()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_non_finite_token_stays_in_its_sequence(each_backend: str, poison: float) -> None:
    problem = _problem([3, 2], [4, 0, 5], 8, 0)
    clean = ak.token_interaction(*problem)
    problem[0][1, 3] = poison
    problem[1][8, 0] = poison
    scores = ak.token_interaction(*problem)
    assert scores.isnan().tolist() == [[True, False, True], [False, False, True]]
    assert torch.equal(scores[1, :2], clean[1, :2])
    _with_gradients(ak.token_interaction, problem)
    tokens, lengths = problem[1], torch.tensor([4, 5])
    assignment, counts = ak.dpc_knn(tokens, lengths, ratio=0.5)
    assert torch.equal(assignment[:4], ak.dpc_knn(tokens[:4], lengths[:1], ratio=0.5)[0])
    assert bool((assignment[4:] < counts[1]).all())


def test_a_score_does_not_depend_on_the_batch_around_it(instruction_set: str) -> None:
    texts, molecules = [33, 7, 128, 1], [16, 90, 3, 200, 250]
    problem = _problem(texts, molecules, 40, 3)
    scores = native.token_interaction(*problem)
    text, smiles, w, v = (
        x.split(sizes) for x, sizes in zip(problem[:4], (texts, molecules) * 2, strict=True)
    )
    for a in range(len(texts)):
        for b in range(len(molecules)):
            alone = native.token_interaction(
                text[a], smiles[b], w[a], v[b], torch.tensor([texts[a]]), torch.tensor([molecules[b]])
            )
            assert alone.item() == scores[a, b].item()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.sampled_from(EDGES), max_size=4),
    width=WIDTHS,
    ratio=st.sampled_from([0.1, 0.25, 0.5, 1.0]),
    k=st.sampled_from([1, 2, 3, 7, 300]),
    seed=st.integers(0, 99),
)
def test_clustering_is_the_reference(
    instruction_set: str, sizes: list[int], width: int, ratio: float, k: int, seed: int
) -> None:
    # Small integers: distances are exact in either summation order, and ties abound.
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(-2, 3, (sum(sizes), width), generator=generator).float()
    lengths = torch.tensor(sizes, dtype=torch.int64)
    got = native.dpc_knn(tokens, lengths, ratio=ratio, k=k)
    expected = clustering.dpc_knn(tokens, lengths, ratio=ratio, k=k)
    assert torch.equal(got[1], expected[1])
    first = 0
    for part in tokens.split(sizes):
        cut = slice(first, first := first + len(part))
        # Two exponentials that round otherwise may exchange importances that are all but equal.
        assert torch.equal(got[0][cut], expected[0][cut]) or _nearly_tied(part, k)


def _nearly_tied(tokens: torch.Tensor, k: int) -> bool:
    """Whether the importances of two tokens of a sequence differ, and by no more than float32 rounds."""
    square = torch.cdist(tokens.double(), tokens.double()).square()
    spread = square.round().topk(min(k, len(tokens)), largest=False).values.mean(dim=1) / tokens.shape[1]
    index = torch.arange(len(tokens))
    denser = (spread < spread[:, None]) | ((spread == spread[:, None]) & (index < index[:, None]))
    separation = torch.where(denser, square, torch.inf).amin(dim=1)
    separation = torch.where(denser.any(dim=1), separation, square.max())
    log = (-spread + separation.clamp_min(1e-300).log() / 2).sort().values
    gaps = log.diff()
    return bool(((gaps > 1e-12) & (gaps < 2e-5)).any())


def test_importances_that_are_all_but_equal_are_seen() -> None:
    generator = torch.Generator().manual_seed(60)
    tokens = torch.randint(-2, 3, (31, 64), generator=generator).float()
    assert _nearly_tied(tokens, 3)
    assert not _nearly_tied(torch.tensor([[0.0], [1.0], [3.0], [7.0], [15.0]]), 2)


@pytest.mark.parametrize("size", EDGES)
def test_clustering_of_random_tokens(instruction_set: str, size: int) -> None:
    tokens = torch.randn(size + 20, 48, generator=torch.Generator().manual_seed(size))
    lengths = torch.tensor([size, 20])
    got = native.dpc_knn(tokens, lengths, ratio=0.25, k=3)
    expected = clustering.dpc_knn(tokens, lengths, ratio=0.25, k=3)
    assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize("width", [1, 5, 8, 33])
def test_cluster_merge_is_the_reference(instruction_set: str, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    lengths = torch.tensor([9, 0, 1, 30])
    tokens = torch.randn(40, width, generator=generator)
    weight = torch.rand(40, generator=generator)
    assignment, counts = clustering.dpc_knn(tokens, lengths, ratio=0.25, k=3)

    def run(operator: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (tokens.clone(), weight.clone())]
        merged = operator(*leaves, assignment, lengths, counts)
        upstream = torch.linspace(-1, 1, merged.numel(), dtype=dtype).view_as(merged)
        return [merged, *torch.autograd.grad((merged * upstream).sum(), leaves)]

    _assert_near(run(native.cluster_merge, torch.float32), run(clustering.cluster_merge, torch.float64), 1e-5)


def test_bitwise_equal_for_every_number_of_threads() -> None:
    problem = _problem([40, 130, 7, 90], [50, 200, 3, 400, 33], 48, 0)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            labels, counts = native.dpc_knn(problem[0], problem[4], ratio=0.25, k=3)
            merged = native.cluster_merge(problem[0], problem[2], labels, problem[4], counts)
            results.append([*_with_gradients(native.token_interaction, problem), labels, merged])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_strided_tokens_are_taken_as_they_are() -> None:
    problem = _problem([5, 6], [7, 3], 8, 0)
    strided = [torch.stack([x, x], dim=-1)[..., 0] for x in problem]
    assert not strided[0].is_contiguous()
    assert torch.equal(native.token_interaction(*strided), native.token_interaction(*problem))


def test_a_longer_sequence_than_the_indices_hold_is_refused() -> None:
    problem = _problem([40000], [1], 1, 0)
    with pytest.raises(ValueError, match=r"^text_lengths: .*32767"):
        native.token_interaction(*problem)


def test_operators_are_well_formed_for_torch() -> None:
    problem = _problem([5, 0, 6], [7, 3], 8, 0)
    leaves = [x.requires_grad_() for x in problem[:4]]
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        native_interaction._interaction, (*leaves, *problem[4:], True), test_utils=utilities
    )
    labels, counts = native.dpc_knn(problem[0], problem[4], ratio=0.5, k=3)
    torch.library.opcheck(
        native_clustering._cluster, (problem[0].detach(), problem[4], counts, 3), test_utils=utilities
    )
    arguments = (leaves[0], leaves[2], labels, problem[4], counts)
    torch.library.opcheck(native_clustering._merge, arguments, test_utils=utilities)


def test_operators_stay_whole_under_torch_compile() -> None:
    problem = _problem([5, 0, 7], [3, 4], 8, 0)
    leaves = [x.requires_grad_() for x in problem[:4]]

    def step(text: Tensor, smiles: Tensor, w: Tensor, v: Tensor) -> Tensor:
        labels, counts = ak.dpc_knn(text, problem[4], ratio=0.5)
        merged = ak.cluster_merge(text, w, labels, problem[4], counts)
        return ak.token_interaction(text, smiles, w, v, *problem[4:]).sum() + merged.square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(step(*leaves), leaves)
    got = torch.autograd.grad(compiled(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_found_again_give_the_same_gradient(
    instruction_set: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Over one group of texts, over several, with empty sequences and with none.
    for texts, molecules in (
        ([40, 0, 7], [50, 3]),
        ([1500, 700, 0, 30, 2040], [20, 0, 33]),
        ([], [3]),
        ([3], []),
    ):
        problem = _problem(texts, molecules, 20, 0)
        problem[:2] = [x.to(dtype) for x in problem[:2]]

        def run(limit: int, problem: list[Tensor] = problem) -> list[Tensor]:
            monkeypatch.setattr(native_interaction, "saved_match_bytes", limit)
            leaves = [x.detach().requires_grad_() for x in problem[:4]]
            scores = native.token_interaction(*leaves, *problem[4:])
            return [scores, *torch.autograd.grad(scores.square().sum(), leaves)]

        assert all(torch.equal(a, b) for a, b in zip(run(2**30), run(-1), strict=True))
