"""The Triton backend where there is no GPU: its tests run in the interpreter, in a process of their own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import atomas_kernels as ak

pytest.importorskip("triton")


def test_clustering_and_contrastive_loss_in_the_interpreter(golden: Path) -> None:
    here = Path(__file__).parent
    files = [str(here / f"interpreted_{name}.py") for name in ("clustering", "contrastive")]
    command = [sys.executable, "-m", "pytest", "-q", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert "skipped" not in result.stdout


def test_triton_by_name_needs_a_cuda_tensor(backend: Callable[[str], None]) -> None:
    backend("triton")
    with pytest.raises(
        RuntimeError, match=r"dpc_knn: the backend 'triton' was chosen but cannot run: .*cuda"
    ):
        ak.dpc_knn(torch.randn(3, 4), torch.tensor([3]), ratio=0.5)
    assert ak.active_backend("info_nce") == "reference"
