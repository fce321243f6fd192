"""The token interaction of bfloat16 tokens in tile registers, in the form that runs without them, and the machine
code of every instruction set.
"""

import importlib
import math
import re
import shutil
import subprocess
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from atomas_kernels.reference import interaction as reference

native = pytest.importorskip("atomas_kernels.native", reason="the native module is not built")
machine = importlib.import_module("atomas_kernels.native.machine")
native_interaction = importlib.import_module("atomas_kernels.native.interaction")
_native = importlib.import_module("atomas_kernels._native")


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Chooses an instruction set for the rest of the test."""
    return lambda name: monkeypatch.setattr(machine, "instruction_set", name)


@pytest.fixture
def emulated(use: Callable[[str], None]) -> None:
    use("amx_emulated")


def _problem(texts: list[int], molecules: list[int], width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(width)
    tokens = [torch.randn(sum(x), width, generator=generator).bfloat16() for x in (texts, molecules)]
    weights = [torch.rand(sum(x), generator=generator) for x in (texts, molecules)]
    return [*tokens, *weights, *(torch.tensor(x, dtype=torch.int64) for x in (texts, molecules))]


def _with_gradients(operator: Callable[..., Tensor], problem: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in problem[:4]]
    scores = operator(*leaves, *problem[4:])
    upstream = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1)).to(scores.dtype)
    return [scores, *torch.autograd.grad((scores * upstream).sum(), leaves)]


def _assert_exact(problem: list[Tensor]) -> None:
    """Scores and weights' gradients as good as float32's; tokens' gradients rounded once to bfloat16."""
    exact = [x.double() if x.is_floating_point() else x for x in problem]
    got = _with_gradients(native.token_interaction, problem)
    expected = _with_gradients(reference.token_interaction, exact)
    tolerances = [2e-6, 2**-8, 2**-8, 2e-6, 2e-6]
    for a, b, tolerance in zip(got, expected, tolerances, strict=True):
        scale = b.abs().max().item() if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b, atol=tolerance * scale, rtol=0)


# A panel holds two tiles of 16 tokens, a step 32 columns.
@pytest.mark.parametrize("size", [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 512])
def test_tiles_at_their_edges(emulated: None, size: int) -> None:
    _assert_exact(_problem([size, 3, size], [7, size, 2], 40))


@pytest.mark.parametrize("width", [1, 2, 3, 31, 32, 33, 63, 64, 65, 100])
def test_tiles_of_any_width(emulated: None, width: int) -> None:
    problem = _problem([40, 5], [33, 9], width)
    if width == 1:
        # Unit tokens of width 1 are all +-1: exact ties, whose gradients through the norm vanish.
        exact = reference.token_interaction(*(x.double() if x.is_floating_point() else x for x in problem))
        torch.testing.assert_close(native.token_interaction(*problem).double(), exact, atol=1e-5, rtol=1e-5)
    else:
        _assert_exact(problem)


def test_tiles_over_several_blocks(emulated: None) -> None:
    _assert_exact(_problem([300, 90, 200, 40], [600, 10, 530, 70], 40))


def test_tiles_agree_with_vectors(use: Callable[[str], None]) -> None:
    problem = _problem([50, 0, 33, 90], [31, 70, 0], 72)
    use("amx_emulated")
    tiles = _with_gradients(native.token_interaction, problem)
    for name in _native.instruction_sets():
        use(name)
        for a, b in zip(tiles, _with_gradients(native.token_interaction, problem), strict=True):
            torch.testing.assert_close(a.double(), b.double(), atol=2e-6 * b.abs().max().item(), rtol=2**-7)


def test_single_precision_does_not_pass_through_tiles(use: Callable[[str], None]) -> None:
    problem = _problem([50, 33], [31, 70], 72)
    problem[:2] = [x.float() * 1.001 for x in problem[:2]]
    results = []
    for name in ("amx_emulated", "baseline"):
        use(name)
        results.append(native.token_interaction(*problem))
    assert torch.equal(*results)


def test_equal_tokens_give_the_gradient_to_the_first(emulated: None) -> None:
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(40, 70, generator=generator).bfloat16()
    smiles = torch.randn(70, generator=generator).bfloat16().repeat(35, 1).requires_grad_()
    arguments = torch.ones(40) / 40, torch.zeros(35), torch.tensor([40]), torch.tensor([35])
    native.token_interaction(text, smiles, *arguments).sum().backward()
    assert smiles.grad is not None
    assert smiles.grad[0].any()
    assert not smiles.grad[1:].any()


def test_zero_tokens_and_large_and_small_ones(emulated: None) -> None:
    problem = _problem([20, 3], [18, 40], 33)
    problem[0][1] = 0
    problem[0][2] *= 1e15
    problem[1][3] *= 1e-9
    _assert_exact(problem)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_non_finite_token_stays_in_its_sequence(emulated: None, poison: float) -> None:
    problem = _problem([3, 2], [4, 0, 5], 8)
    clean = native.token_interaction(*problem)
    problem[0][1, 3] = poison
    problem[1][8, 0] = poison
    scores = native.token_interaction(*problem)
    assert scores.isnan().tolist() == [[True, False, True], [False, False, True]]
    assert torch.equal(scores[1, :2], clean[1, :2])
    _with_gradients(native.token_interaction, problem)


def test_bitwise_equal_for_every_number_of_threads(emulated: None) -> None:
    problem = _problem([40, 130, 7, 90], [50, 200, 3, 400, 33], 48)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(_with_gradients(native.token_interaction, problem))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_emulation_is_never_chosen() -> None:
    assert "amx_emulated" not in _native.instruction_sets()
    assert machine.instruction_set == _native.instruction_sets()[0]


def test_what_the_machine_does_not_run_is_refused(use: Callable[[str], None]) -> None:
    missing = {"amx_bf16", "avx512", "avx2"} - set(_native.instruction_sets())
    if not missing:
        pytest.skip("this machine runs every instruction set")
    for name in missing:
        use(name)
        with pytest.raises(ValueError, match=f"isa: this machine does not run {name}"):
            native.token_interaction(*_problem([2], [3], 4))


@pytest.fixture(scope="module")
def machine_code() -> dict[str, str]:
    """Disassembled functions by instruction set, as far as the module holds them."""
    if shutil.which("objdump") is None:
        pytest.skip("there is no objdump to look at the machine code with")
    command = ["objdump", "-d", "--no-show-raw-insn", _native.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "file format elf64-x86-64" not in listing:
        pytest.skip("the module is not built for x86-64")
    code: dict[str, str] = {}
    for function in listing.split("\n\n"):
        # Names are mangled: each part follows its length.
        found = re.match(r"[0-9a-f]+ <_ZN?[^>]*?(8baseline|4avx2|6avx512|8amx_bf16|12amx_emulated)", function)
        if found:
            name = found[1].lstrip("0123456789")
            code[name] = code.get(name, "") + function
    if not code:
        pytest.skip("the module is stripped of its symbols")
    return code


def test_instruction_sets_hold_their_instructions(machine_code: dict[str, str]) -> None:
    assert "%ymm" in machine_code["avx2"]
    assert "vfmadd" in machine_code["avx2"]
    assert "%zmm" in machine_code["avx512"]
    if "amx_bf16" not in machine_code:
        pytest.skip("the compiler of this module did not know AMX")
    for instruction in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease", "%zmm"):
        assert instruction in machine_code["amx_bf16"]


def test_no_instruction_set_holds_those_of_a_larger_one(machine_code: dict[str, str]) -> None:
    for name, foreign in {
        "baseline": r"%ymm|%zmm|\bv[a-z]+ps\b|tdp",
        "amx_emulated": r"%ymm|%zmm|\bv[a-z]+ps\b|tdp",
        "avx2": r"%zmm|tdp",
        "avx512": r"tdp",
    }.items():
        assert re.search(foreign, machine_code[name]) is None
