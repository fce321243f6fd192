"""Choice of the backend."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

import atomas_kernels as ak
from atomas_kernels import registry


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_an_unknown_name_lists_the_backends() -> None:
    with pytest.raises(ValueError, match="no backend 'gpu'; choose one of auto, reference, native, triton"):
        ak.set_backend("gpu")
    with pytest.raises(ValueError, match="no operator 'softmax'"):
        ak.active_backend("softmax")


def test_auto_takes_the_first_that_is_made_for_the_tensors(backend: Callable[[str], None]) -> None:
    pytest.importorskip("atomas_kernels._native", reason="the native module is not built")
    backend("auto")
    assert ak.active_backend("token_interaction", "cpu") == "native"
    assert ak.active_backend("token_interaction", "cpu", torch.float64) == "reference"
    assert ak.active_backend("momentum_update", "cpu") == "reference"
    assert ak.active_backends("cpu")["cluster_merge"] == "native"
    pytest.importorskip("triton")
    fused = ("dpc_knn", "cluster_merge", "token_interaction", "contrastive_cross_entropy")
    assert {ak.active_backend(op, "cuda") for op in fused} == {"triton"}
    assert ak.active_backend("token_interaction", "cuda", torch.float64) == "reference"


def test_native_by_name_refuses_what_it_cannot_run(backend: Callable[[str], None]) -> None:
    backend("native")
    with pytest.raises(RuntimeError, match=r"'native' was chosen but cannot run: .*float64"):
        ak.active_backend("dpc_knn", "cpu", torch.float64)
    with pytest.raises(RuntimeError, match="it runs on cpu, the tensors are on meta"):
        ak.active_backend("dpc_knn", "meta")


def test_native_by_name_is_chosen_for_the_tensors_device(
    backend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_import_error", lambda module: None)
    backend("native")

    def module(op: str, device: str) -> str:
        return registry._select(op, torch.device(device), torch.float32).target.partition(":")[0]

    assert module("dpc_knn", "cpu") == "atomas_kernels.native"
    assert module("dpc_knn", "cuda") == "atomas_kernels.cuda.clustering"
    assert module("momentum_update", "cuda") == "atomas_kernels.cuda.momentum"
    assert module("momentum_update", "cpu") == "atomas_kernels.reference.momentum"
    assert module("token_interaction", "cuda") == "atomas_kernels.reference.interaction"


def test_native_by_name_on_cuda_needs_the_library(
    backend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_import_error", lambda module: f"{module} was not built")
    backend("native")
    with pytest.raises(
        RuntimeError, match=r"'native' was chosen but cannot run: atomas_kernels\.cuda\.clustering was not"
    ):
        ak.active_backend("dpc_knn", "cuda")


def test_auto_falls_back_with_one_log_line(
    backend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry._import_error.cache_clear()
    monkeypatch.setitem(sys.modules, "atomas_kernels.native", None)
    backend("auto")
    for op in ("dpc_knn", "cluster_merge", "token_interaction"):
        assert ak.active_backend(op) == "reference"
    assert len(caplog.records) == 1
    backend("native")
    with pytest.raises(RuntimeError, match="'native' was chosen but cannot run"):
        ak.active_backend("dpc_knn")
    monkeypatch.undo()
    registry._import_error.cache_clear()


def test_the_environment_variable_is_read_and_checked() -> None:
    code = "import atomas_kernels as ak; print(ak.active_backend('dpc_knn'))"
    assert _python(code, ATOMAS_KERNELS="reference").stdout.strip() == "reference"
    wrong = _python(code, ATOMAS_KERNELS="cuda")
    assert wrong.returncode != 0
    assert "ATOMAS_KERNELS: no backend 'cuda'" in wrong.stderr


def test_importing_the_package_loads_no_backend() -> None:
    code = (
        "import sys, atomas_kernels; print('triton' in sys.modules, 'atomas_kernels.native' in sys.modules)"
    )
    assert _python(code).stdout.split() == ["False", "False"]
