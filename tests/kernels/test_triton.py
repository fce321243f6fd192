"""The Triton backend where there is no GPU: the interpreter's results, and what the compiler makes of each kernel."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import atomas_kernels as ak

pytest.importorskip("triton")


def test_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).parent / "interpreted.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert "skipped" not in result.stdout


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("number", range(4))
def test_kernels_compile_without_spills(number: int, architecture: int) -> None:
    from atomas_kernels import aot

    configurations = list(aot.configurations())
    assert len(configurations) == 4
    resources = aot.compile_for(configurations[number], architecture)
    assert resources.stack_bytes == 0
    assert resources.spill_instructions == 0
    assert resources.registers <= 255
    assert resources.shared_bytes <= {80: 163, 90: 227}[architecture] * 1024
    assert resources.tensor_core_instructions > 0


def test_triton_by_name_needs_a_cuda_tensor(backend: Callable[[str], None]) -> None:
    backend("triton")
    with pytest.raises(
        RuntimeError, match=r"dpc_knn: the backend 'triton' was chosen but cannot run: .*cuda"
    ):
        ak.dpc_knn(torch.randn(3, 4), torch.tensor([3]), ratio=0.5)
    assert ak.active_backend("info_nce") == "reference"
