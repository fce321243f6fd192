"""Every operator with every backend of the device, in every dtype, against float64."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

import atomas_kernels as ak
from atomas_kernels.reference import clustering, momentum
from tests.gpu import eager
from tests.gpu.problems import (
    DEVICE,
    DTYPES,
    PROBLEMS,
    Problem,
    Results,
    backends,
    evaluate,
    largest_error,
    norm_error,
)

CAPS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
WIDTHS = (40, 768)

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_width = pytest.mark.parametrize("width", WIDTHS)
each_problem = pytest.mark.parametrize(
    ("name", "chosen"),
    [(name, backend) for name, build in PROBLEMS.items() for backend in backends(build(WIDTHS[0]).op)],
)
each_clustering = pytest.mark.parametrize("chosen", backends("dpc_knn"))


@cache
def _judged(name: str, width: int, dtype: torch.dtype) -> tuple[Problem, Results, Results]:
    """A problem, its results in float64 and those of plain PyTorch in `dtype`."""
    problem = PROBLEMS[name](width)
    operator = getattr(eager, problem.op)
    exact = evaluate(operator, problem.arguments(dtype, exact=True))
    return problem, exact, evaluate(operator, problem.arguments(dtype))


@each_problem
@each_width
@each_dtype
def test_as_exact_as_plain_pytorch(
    backend: Callable[[str], None], name: str, chosen: str, width: int, dtype: torch.dtype
) -> None:
    problem, exact, plain = _judged(name, width, dtype)
    backend(chosen)
    got = evaluate(getattr(ak, problem.op), problem.arguments(dtype))
    error = largest_error(got.output, exact.output)
    assert error <= 2 * largest_error(plain.output, exact.output) + 1e-5
    assert error <= CAPS[dtype]
    for leaf, wanted in exact.gradients.items():
        # In norm: where rounding moves a maximum, another token takes the whole gradient.
        error = norm_error(got.gradients[leaf], wanted)
        assert error <= 2 * norm_error(plain.gradients[leaf], wanted) + 1e-5, leaf
        # The reference multiplies in the dtype of its input where that is what plain PyTorch does.
        if chosen != "reference" and name != "token_interaction":
            cosine = torch.cosine_similarity(got.gradients[leaf].flatten(), wanted.flatten(), dim=0)
            assert cosine > 0.9999, leaf


@each_problem
@each_dtype
def test_two_runs_are_bitwise_equal(
    backend: Callable[[str], None], name: str, chosen: str, dtype: torch.dtype
) -> None:
    if chosen == "reference" and DEVICE.type == "cuda":
        pytest.skip("the reference promises it on the CPU only: index_add is atomic on CUDA")
    backend(chosen)
    problem = PROBLEMS[name](WIDTHS[1])
    first, second = (evaluate(getattr(ak, problem.op), problem.arguments(dtype)) for _ in range(2))
    assert torch.equal(first.output, second.output)
    assert all(torch.equal(first.gradients[leaf], second.gradients[leaf]) for leaf in first.gradients)


def _cluster(tokens: Tensor, sizes: list[int], k: int = 3) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor(sizes, device=DEVICE)
    return ak.dpc_knn(tokens.to(DEVICE), lengths, ratio=0.25, k=k)


def _labels(tokens: Tensor, sizes: list[int], k: int = 3) -> Tensor:
    """Those of the reference on the CPU, which computes distances in float64."""
    return clustering.dpc_knn(tokens.cpu(), torch.tensor(sizes), ratio=0.25, k=k)[0].to(DEVICE)


@each_clustering
@each_dtype
@pytest.mark.parametrize("k", [1, 3, 9])
@pytest.mark.parametrize(
    "sizes", [[0, 1, 2, 3], [15, 16, 17, 33], [63, 64, 65], [127, 128, 129], [511, 512, 513]]
)
def test_clustering_with_exact_distances(
    backend: Callable[[str], None], chosen: str, sizes: list[int], k: int, dtype: torch.dtype
) -> None:
    backend(chosen)
    # Small integers: distances are exact in any arithmetic, duplicates and ties abound.
    tokens = torch.randint(-2, 3, (sum(sizes), 24), generator=torch.Generator().manual_seed(k)).to(dtype)
    labels, counts = _cluster(tokens, sizes, k)
    assert counts.tolist() == clustering.cluster_counts(torch.tensor(sizes), 0.25).tolist()
    assert torch.equal(labels, _labels(tokens, sizes, k))


@each_clustering
@each_dtype
def test_clustering_of_random_tokens(backend: Callable[[str], None], chosen: str, dtype: torch.dtype) -> None:
    backend(chosen)
    sizes = [110, 60, 200, 7, 512]
    tokens = torch.randn(sum(sizes), 768, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels, wanted = _cluster(tokens, sizes)[0], _labels(tokens, sizes)
    # Near ties may fall either way; who is together with whom hardly depends on them.
    for got, expected in zip(labels.split(sizes), wanted.split(sizes), strict=True):
        same = (got[:, None] == got) == (expected[:, None] == expected)
        assert same.double().mean() > 0.999
    assert torch.equal(labels, _cluster(tokens, sizes)[0])


@each_clustering
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_clustering_with_a_token_that_is_not_finite(
    backend: Callable[[str], None], chosen: str, poison: float
) -> None:
    backend(chosen)
    sizes = [40, 130, 300]
    tokens = torch.randn(sum(sizes), 16, generator=torch.Generator().manual_seed(0))
    clean = _cluster(tokens, sizes)[0].split(sizes)
    tokens[100, 3] = poison
    labels, counts = _cluster(tokens, sizes)
    dirty = labels.split(sizes)
    assert torch.equal(dirty[0], clean[0])
    assert torch.equal(dirty[2], clean[2])
    assert bool((dirty[1] < counts[1]).all())


@pytest.mark.parametrize("chosen", backends("momentum_update"))
@each_dtype
def test_momentum_update(backend: Callable[[str], None], chosen: str, dtype: torch.dtype) -> None:
    backend(chosen)
    generator = torch.Generator().manual_seed(0)
    sizes = [0, 1, 1000, 16385, 100_000, *[31] * 200]
    targets = [torch.randn(size, generator=generator) for size in sizes]
    sources = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    moved = [target.clone().to(DEVICE) for target in targets]
    ak.momentum_update(moved, [source.to(DEVICE) for source in sources], 0.995)
    momentum.momentum_update(targets, sources, 0.995)
    # Ours promises the bits of the reference on the CPU, torch on another device does not.
    tolerance = 1e-6 if chosen == "reference" else 0
    for got, expected in zip(moved, targets, strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="streams are of CUDA")
@pytest.mark.parametrize("chosen", [name for name in backends("dpc_knn") if name != "reference"])
def test_kernels_run_on_the_current_stream(backend: Callable[[str], None], chosen: str) -> None:
    backend(chosen)
    sizes = [300, 100]
    tokens = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    expected = _labels(tokens, sizes)
    late = torch.zeros(400, 64, device=DEVICE)
    source, busy = tokens.to(DEVICE), torch.randn(8192, 8192, device=DEVICE)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        lengths = torch.tensor(sizes, device=DEVICE)
        for _ in range(8):
            busy = busy @ busy  # keeps the stream back
        late.copy_(source)
        labels, _ = ak.dpc_knn(late, lengths, ratio=0.25)
        sums = [torch.zeros(400, 64, device=DEVICE)]
        ak.momentum_update(sums, [late], 0.0)
    stream.synchronize()
    same = (labels[:300, None] == labels[:300]) == (expected[:300, None] == expected[:300])
    assert same.double().mean() > 0.999
    assert torch.equal(sums[0], source)
