"""Clustering in the interpreter, on CPU tensors; run by test_triton.py with TRITON_INTERPRET=1.

Only float32 and float16: the interpreter's arithmetic on bfloat16 is wrong. Where a test wants the very labels of the
reference over many tokens, these are small integers, whose distances every order of summation gives exactly.
"""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from atomas_kernels.reference import clustering as reference
from atomas_kernels.triton import clustering

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def _configurations_of_sm_90(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "architecture", lambda device: 90)


def _random(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def _integers(count: int, width: int, largest: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, (count, width), generator=generator).float()


def _assert_is_the_reference(tokens: Tensor, sizes: list[int], ratio: float = 0.25, k: int = 3) -> Tensor:
    lengths = torch.tensor(sizes, dtype=torch.int64)
    got, expected = (op(tokens, lengths, ratio=ratio, k=k) for op in (clustering.dpc_knn, reference.dpc_knn))
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    return got[0]


@pytest.mark.parametrize(
    "sizes",
    [
        [1],
        [2, 0, 3],
        [15, 16, 17],
        [31, 32, 33],
        [63, 64, 65],
        [127, 128, 5],
        [129, 4],
        [191, 0, 193],
        [],
        [0],
    ],
)
@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_lengths_around_every_tile(sizes: list[int], ratio: float) -> None:
    _assert_is_the_reference(_random(sum(sizes), 24), sizes, ratio)


def test_the_tiles_of_sm_80(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "architecture", lambda device: 80)
    _assert_is_the_reference(_random(165, 24), [64, 65, 2, 0, 33, 1])


def test_512_tokens() -> None:
    _assert_is_the_reference(_integers(512, 24, largest=20), [512])


@pytest.mark.parametrize("k", [1, 3, 50])
@pytest.mark.parametrize("sizes", [[40, 20], [130, 20]])
def test_exact_ties(sizes: list[int], k: int) -> None:
    _assert_is_the_reference(_integers(sum(sizes), 6, largest=1, seed=k).half(), sizes, 0.5, k)


def test_more_neighbours_than_tokens() -> None:
    _assert_is_the_reference(_integers(25, 6, largest=9), [20, 5], k=22)


@pytest.mark.parametrize("count", [50, 150])
def test_duplicated_tokens(count: int) -> None:
    distinct = _random(12, 33)
    copies = torch.randint(12, (count,), generator=torch.Generator().manual_seed(1))
    _assert_is_the_reference(distinct[copies], [count])
    _assert_is_the_reference(torch.ones(count, 33), [count])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite(poison: float) -> None:
    tokens = _random(30, 8)
    tokens[14, 2] = poison
    _assert_is_the_reference(tokens, [12, 18])
    tokens = _integers(140, 8, largest=20)
    tokens[100, 2] = poison
    _assert_is_the_reference(tokens, [10, 130])


def test_a_sequence_is_clustered_alike_in_every_batch_and_run() -> None:
    sizes = [30, 130, 60, 100]
    parts = _random(sum(sizes), 20).split(sizes)
    together = clustering.dpc_knn(torch.cat(parts), torch.tensor(sizes), ratio=0.3, k=3)[0]
    again = clustering.dpc_knn(torch.cat(parts[::-1]), torch.tensor(sizes[::-1]), ratio=0.3, k=3)[0]
    for label, other, part in zip(
        together.split(sizes), reversed(again.split(sizes[::-1])), parts, strict=True
    ):
        alone = clustering.dpc_knn(part, torch.tensor([len(part)]), ratio=0.3, k=3)[0]
        assert torch.equal(label, alone)
        assert torch.equal(label, other)


def test_tokens_that_are_not_contiguous() -> None:
    _assert_is_the_reference(_random(16, 40).T, [40])


def test_wrong_lengths_never_reach_a_kernel() -> None:
    for wrong in ([3, -1], [3]):
        with pytest.raises(ValueError, match="lengths"):
            clustering.dpc_knn(_random(2, 4), torch.tensor(wrong), ratio=0.5, k=3)


@pytest.mark.parametrize("number", range(4))
def test_golden(golden: Path, number: int) -> None:
    prefix = f"case{number}."
    recorded = load_file(golden / "clustering.safetensors")
    case = {name.removeprefix(prefix): x for name, x in recorded.items() if name.startswith(prefix)}
    batch, n, _ = case["tokens"].shape
    ratio = round(case["ratio"].item(), 6)
    tokens, lengths = case["tokens"].flatten(0, 1), torch.full((batch,), n)
    assignment, _ = clustering.dpc_knn(tokens, lengths, ratio=ratio, k=int(case["k"]))
    assert torch.equal(assignment.view(batch, n), case["assignment"])


def test_operator_is_declared_to_torch() -> None:
    tokens, lengths = _random(9, 4), torch.tensor([4, 5])
    counts = reference.cluster_counts(lengths, 0.5)
    torch.library.opcheck(clustering._cluster, (tokens, lengths, counts, 3))


def test_the_interpreter_refuses_bfloat16() -> None:
    with pytest.raises(TypeError, match="computes bfloat16 wrongly"):
        clustering.dpc_knn(_random(4, 4).bfloat16(), torch.tensor([4]), ratio=0.5, k=3)
