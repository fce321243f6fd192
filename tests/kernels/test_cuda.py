"""The CUDA library where there is no GPU: how it compiles and loads, and its kernels emulated on the CPU.

The emulation compiles the same sources as C++ with the headers of cuda_emulation/ and calls them through the same
Python module, so the kernels' indices and barriers and the arguments' order are those of the GPU.
"""

import ctypes
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from atomas_kernels import cuda_resources
from atomas_kernels.reference import clustering as reference
from atomas_kernels.reference import momentum

ROOT = Path(__file__).parents[2]
# Around the tiles (64 tokens, 16 features), around a warp, and a block with more tokens than threads (512).
SIZES = [0, 1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129]
SHARED_BYTES = 48 * 1024  # what a kernel gets without asking


@pytest.fixture(scope="module")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or pytest.skip("needs g++")
    output = tmp_path_factory.mktemp("emulation") / "emulated.so"
    # Out-of-bounds indices of arrays end the process; no product is contracted that the source does not contract.
    checked = ["-fsanitize=bounds", "-fsanitize-undefined-trap-on-error", "-ffp-contract=off"]
    plain = [
        "-std=c++17",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-fno-strict-aliasing",
    ]
    sources = sorted(str(path) for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    headers = f"-I{Path(__file__).parent / 'cuda_emulation'}"
    command = [
        compiler,
        *plain,
        *checked,
        "-fPIC",
        "-shared",
        headers,
        "-x",
        "c++",
        *sources,
        "-o",
        str(output),
    ]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(output))


@pytest.fixture(scope="module")
def cuda(emulated_library: ctypes.CDLL) -> Iterator[SimpleNamespace]:
    """The operators of the CUDA backend over the emulated library, taking CPU tensors."""
    with mock.patch.object(ctypes, "CDLL", return_value=emulated_library):  # where the real one is not built
        from atomas_kernels.cuda import clustering, library
        from atomas_kernels.cuda import momentum as cuda_momentum
    custom = (clustering._cluster, clustering._merge, clustering._merge_backward, cuda_momentum._interpolate)
    for operator in custom:
        operator.register_kernel("cpu")(operator._init_fn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_library", emulated_library)
        patch.setattr(library, "_stream_of", lambda tensor: nullcontext((0, 0)))
        yield SimpleNamespace(
            dpc_knn=clustering.dpc_knn,
            cluster_merge=clustering.cluster_merge,
            momentum_update=cuda_momentum.momentum_update,
            custom=custom,
            library=library,
        )


@pytest.fixture(params=[1, -1], ids=["forwards", "backwards"])
def order(request: pytest.FixtureRequest, emulated_library: ctypes.CDLL) -> Iterator[None]:
    """Runs the test with the threads of a block in either order."""
    value = ctypes.c_int.in_dll(emulated_library, "atomas_emulation_order")
    value.value = request.param
    yield
    value.value = 1


def _assert_is_the_reference(
    cuda: SimpleNamespace, tokens: Tensor, sizes: list[int], *, ratio: float = 0.25, k: int = 3
) -> None:
    lengths = torch.tensor(sizes, dtype=torch.int64)
    got, expected = (op.dpc_knn(tokens, lengths, ratio=ratio, k=k) for op in (cuda, reference))
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize(
    "sizes", [[], [0, 0], [1], [64, 0, 2], [63, 65, 1], [127, 128, 129], [511], [512, 3], [515]]
)
@pytest.mark.parametrize("width", [1, 15, 40])
def test_clustering_at_the_tiles_edges(
    cuda: SimpleNamespace, order: None, sizes: list[int], width: int
) -> None:
    generator = torch.Generator().manual_seed(width)
    tokens = torch.randn(sum(sizes), width, generator=generator)
    if width == 1:  # a line has too many near ties to be random
        tokens = torch.randint(-40, 40, tokens.shape, generator=generator).float()
    _assert_is_the_reference(cuda, tokens, sizes)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.sampled_from(SIZES), max_size=4),
    width=st.sampled_from([1, 3, 15, 16, 17, 33]),
    ratio=st.sampled_from([0.1, 0.25, 0.5, 1.0]),
    k=st.sampled_from([1, 2, 3, 4, 5, 9, 300]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_clustering_with_exact_ties(
    cuda: SimpleNamespace, sizes: list[int], width: int, ratio: float, k: int, dtype: torch.dtype, seed: int
) -> None:
    # Small integers: distances are exact, duplicates and ties abound.
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(-2, 3, (sum(sizes), width), generator=generator).to(dtype)
    _assert_is_the_reference(cuda, tokens, sizes, ratio=ratio, k=k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_it_is(cuda: SimpleNamespace, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    exponent = torch.randint(-20, 4, (90, 24), generator=generator).float()
    tokens = (torch.randn(90, 24, generator=generator) * exponent.exp2()).to(dtype)  # subnormal halves too
    _assert_is_the_reference(cuda, tokens, [70, 20])


def test_equal_tokens_are_at_distance_zero(cuda: SimpleNamespace) -> None:
    token = torch.randn(1, 48, generator=torch.Generator().manual_seed(0)) * 1e3
    _assert_is_the_reference(cuda, token.repeat(70, 1), [70], k=5)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_token_that_is_not_finite_counts_as_infinitely_far(
    cuda: SimpleNamespace, order: None, poison: float
) -> None:
    tokens = torch.randn(150, 8, generator=torch.Generator().manual_seed(0))
    tokens[[14, 140], [2, 5]] = poison
    _assert_is_the_reference(cuda, tokens, [12, 138])
    _assert_is_the_reference(cuda, torch.full((5, 3), poison), [5])


def test_a_sequence_does_not_depend_on_its_batch(cuda: SimpleNamespace) -> None:
    sizes = [70, 0, 130, 3]
    tokens = torch.randn(sum(sizes), 20, generator=torch.Generator().manual_seed(0))
    whole = cuda.dpc_knn(tokens, torch.tensor(sizes), ratio=0.25, k=3)[0].split(sizes)
    for part, size, labels in zip(tokens.split(sizes), sizes, whole, strict=True):
        assert torch.equal(cuda.dpc_knn(part, torch.tensor([size]), ratio=0.25, k=3)[0], labels)


def test_strided_tokens_are_taken_as_they_are(cuda: SimpleNamespace) -> None:
    tokens = torch.randn(40, 9, generator=torch.Generator().manual_seed(0))
    _assert_is_the_reference(cuda, torch.stack([tokens, tokens], dim=-1)[..., 0], [40])


def test_wrong_lengths_never_reach_the_kernel(cuda: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=r"^lengths: lengths sum to 5, but there are 4 tokens"):
        cuda.dpc_knn(torch.randn(4, 2), torch.tensor([5]), ratio=0.5, k=3)
    with pytest.raises(ValueError, match=r"^lengths: negative length -1"):
        cuda.dpc_knn(torch.randn(4, 2), torch.tensor([5, -1]), ratio=0.5, k=3)
    with pytest.raises(ValueError, match=r"^lengths: .* up to 23104 tokens"):
        cuda.dpc_knn(torch.randn(23105, 1), torch.tensor([23105]), ratio=0.5, k=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 128, 130])
def test_merge_is_the_reference(cuda: SimpleNamespace, order: None, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    lengths, counts = torch.tensor([0, 9, 0, 1, 70, 2, 0]), torch.tensor([0, 3, 0, 1, 30, 2, 0])
    tokens = torch.randn(82, width, generator=generator).to(dtype)
    weight = torch.rand(82, generator=generator)
    # Random members: some clusters are empty.
    highest = counts.repeat_interleave(lengths)
    labels = (torch.rand(82, generator=generator) * highest).long()

    def run(operator: Callable[..., Tensor], rounded: torch.dtype) -> list[Tensor]:
        leaves = [tokens.to(rounded).requires_grad_(), weight.clone().requires_grad_()]
        merged = operator(*leaves, labels, lengths, counts)
        assert merged.dtype == rounded
        upstream = torch.linspace(-1, 1, merged.numel()).view_as(merged).to(dtype).to(rounded)
        return [merged, *torch.autograd.grad((merged * upstream).sum(), leaves)]

    # Half precision is computed in float32 and rounded at the end.
    pairs = zip(run(cuda.cluster_merge, dtype), run(reference.cluster_merge, torch.float32), strict=True)
    for got, expected in pairs:
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
        assert (got.float() - expected).abs().max() <= tolerance * expected.abs().max()


def test_merge_refuses_labels_that_have_no_cluster(cuda: SimpleNamespace) -> None:
    tokens, ones = torch.randn(3, 2), torch.ones(3)
    with pytest.raises(ValueError, match=r"^assignment: an index is out of range"):
        cuda.cluster_merge(tokens, ones, torch.tensor([0, 0, 1]), torch.tensor([2, 1]), torch.tensor([1, 1]))


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.995, 1.0])
def test_momentum_update_is_the_reference_to_the_bit(cuda: SimpleNamespace, order: None, rate: float) -> None:
    generator = torch.Generator().manual_seed(0)
    # Around a chunk (16384) and, with 300 tensors, around a launch (128 tensors).
    shapes = [(0,), (1,), (3, 5), (16383,), (2, 8192), (16385,), (40000,), *[(7,)] * 293]
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    targets = [torch.randn(shape, generator=generator) for shape in shapes]
    sources = [
        torch.randn(shape, generator=generator).to(dtypes[i % 4]).requires_grad_()
        for i, shape in enumerate(shapes)
    ]
    sources[2] = torch.randn(5, 3, generator=generator).T
    expected = [target.clone() for target in targets]
    momentum.momentum_update(expected, sources, rate)
    cuda.momentum_update(targets, sources, rate)
    assert all(torch.equal(a, b) for a, b in zip(targets, expected, strict=True))


def test_momentum_update_of_a_part_leaves_the_rest(cuda: SimpleNamespace) -> None:
    flat = torch.zeros(100)
    cuda.momentum_update([flat[1:34], flat[50:51]], [torch.ones(33), torch.ones(1)], 0.0)
    assert flat.nonzero().flatten().tolist() == [*range(1, 34), 50]


def test_momentum_update_names_what_it_cannot_take(cuda: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="targets: tensor 1 is not contiguous"):
        cuda.momentum_update([torch.zeros(2), torch.zeros(4, 3).T], [torch.zeros(2), torch.zeros(3, 4)], 0.5)


def test_operators_are_well_formed_for_torch(cuda: SimpleNamespace) -> None:
    cluster, merge, _, interpolate = cuda.custom
    tokens, lengths, counts = torch.randn(8, 4), torch.tensor([5, 3]), torch.tensor([2, 1])
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(cluster, (tokens, lengths, counts, 3), test_utils=utilities)
    pairs = [torch.zeros(3), torch.zeros(2)], [torch.ones(3), torch.ones(2)]
    torch.library.opcheck(interpolate, (*pairs, 0.5), test_utils=utilities)
    labels = torch.tensor([0, 1, 1, 0, 0, 0, 0, 0])
    arguments = (tokens.requires_grad_(), torch.rand(8).requires_grad_(), labels, lengths, counts)
    with_gradient = (*utilities, "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(merge, arguments, test_utils=with_gradient)


def test_an_error_of_the_device_names_the_operator(
    cuda: SimpleNamespace, emulated_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe = emulated_library.atomas_error_string
    failing = SimpleNamespace(atomas_dpc_knn=lambda *_: 9, atomas_error_string=describe)
    monkeypatch.setattr(cuda.library, "_library", failing)
    with pytest.raises(RuntimeError, match=r"^dpc_knn: .*invalid configuration argument \(error 9\)"):
        cuda.dpc_knn(torch.randn(4, 2), torch.tensor([4]), ratio=0.5, k=3)


def test_the_built_library_loads_and_says_that_there_is_no_device() -> None:
    path = ROOT / "kernels" / "atomas_kernels" / "libatomas_cuda.so"
    if not path.exists():
        pytest.skip("the CUDA library is not built (no nvcc at install)")
    if torch.cuda.is_available():
        pytest.skip("there is a device: tests/gpu runs the library")
    library = ctypes.CDLL(str(path))
    library.atomas_error_string.restype = ctypes.c_char_p
    nothing = ctypes.c_void_p(None)
    status = library.atomas_momentum_update(
        0, nothing, ctypes.c_int64(1), nothing, nothing, nothing, nothing, ctypes.c_float(0.5)
    )
    assert status != 0
    assert re.search(r"driver|device", library.atomas_error_string(status).decode())


def _exported(path: Path) -> set[str]:
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True
    )
    return {line.split()[-1] for line in listed.stdout.splitlines()}


def test_the_library_keeps_its_runtime_to_itself() -> None:
    path = ROOT / "kernels" / "atomas_kernels" / "libatomas_cuda.so"
    if not path.exists() or not shutil.which("nm"):
        pytest.skip("the CUDA library is not built (no nvcc at install)")
    operators = {"dpc_knn", "cluster_merge", "cluster_merge_gradient", "momentum_update", "error_string"}
    assert _exported(path) == {f"atomas_{name}" for name in operators}


@pytest.mark.parametrize("architecture", cuda_resources.ARCHITECTURES)
@pytest.mark.parametrize("source", cuda_resources.sources(), ids=lambda path: path.stem)
def test_kernels_compile_without_spills(source: Path, architecture: int) -> None:
    if cuda_resources.nvcc() is None:
        pytest.skip("needs nvcc")
    kernels = cuda_resources.compile_source(source, architecture)
    assert len(kernels) == {"clustering": 4, "merging": 6, "momentum": 1}[source.stem]
    for kernel in kernels:
        assert kernel.architecture == f"sm_{architecture}"
        assert kernel.stack_bytes == kernel.spill_bytes == 0, kernel
        assert kernel.shared_bytes <= SHARED_BYTES, kernel
        # At least two blocks on a multiprocessor of 65536 registers.
        threads = 512 if kernel.kernel.startswith("assign") else 256
        assert kernel.registers * threads <= 32768, kernel


def test_resources_are_those_of_the_flags_that_the_library_is_built_with() -> None:
    assert " ".join(cuda_resources.FLAGS) in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_the_gpu_script_says_in_one_line_that_there_is_no_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [str(ROOT / "kernels" / "bench" / "gpu.sh"), str(tmp_path / "out")]
    environment = os.environ | {"PYTHON": sys.executable, "ATOMAS_GPU_TEST_DEVICE": "cuda"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "gpu.sh: torch sees no CUDA GPU; nothing was built, tested or timed\n"
    assert not any((tmp_path / "out").iterdir())
