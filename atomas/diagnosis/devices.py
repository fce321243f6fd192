"""Devices and kernels: what torch sees, what the driver reports, and whether the operators compute what they should."""

import ctypes.util
import shutil
import subprocess

import torch

import atomas_kernels
from atomas.diagnosis.result import CheckResult

_QUERY = (
    "index,ecc.errors.uncorrected.volatile.total,retired_pages.pending,clocks_throttle_reasons.hw_slowdown,"
    "clocks_throttle_reasons.sw_thermal_slowdown,temperature.gpu,memory.used,memory.total"
)
"""Fields as `nvidia-smi --help-query-gpu` lists them."""
BUSY_MEMORY_SHARE = 0.1
"""Of a GPU's memory taken by others before the job."""
TOLERANCE = 1e-4
"""Of the largest value, between a kernel and the reference in float32."""


def check_devices() -> CheckResult:
    """The GPUs that torch sees."""
    name = "devices"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        return CheckResult(
            name=name, status="ok", message=f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}"
        )
    if shutil.which("nvidia-smi") is None:
        return CheckResult(name=name, status="skipped", message="no GPU here: the job would run on the CPU")
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return CheckResult(
        name=name,
        status="error",
        message=f"the driver is there, but torch {torch.__version__}, {build}, sees no GPU",
        remedy="install the torch for this driver (nvidia-smi shows its CUDA), and look at CUDA_VISIBLE_DEVICES",
    )


def check_gpu_health() -> CheckResult:
    """Memory errors, clocks and what others have taken, as the driver reports them."""
    name = "GPU health"
    if shutil.which("nvidia-smi") is None:
        return CheckResult(name=name, status="skipped", message="no nvidia-smi here")
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    told = (done.stderr or done.stdout).strip()
    if done.returncode:
        return CheckResult(
            name=name,
            status="error",
            message=f"nvidia-smi failed: {told.splitlines()[0] if told else f'exit code {done.returncode}'}",
            remedy="the driver or a GPU is not well: leave this node out (--exclude)",
        )
    return gpu_health(done.stdout)


def gpu_health(report: str) -> CheckResult:
    """Read the lines of nvidia-smi; what a GPU does not report reads [N/A] or [Not Supported], and is said."""
    name = "GPU health"
    wrong, doubtful, untold, hottest = [], [], [], 0.0
    for line in report.strip().splitlines():
        index, errors, retired, hardware, thermal, temperature, used, total = map(str.strip, line.split(","))
        if errors.isdecimal() and int(errors):
            wrong.append(f"GPU {index} has {errors} uncorrected memory errors")
        if retired == "Yes":
            wrong.append(f"GPU {index} waits for a reset that retires bad memory")
        if "Active" in (hardware, thermal):
            why = "hardware" if hardware == "Active" else "driver, which finds it too hot,"
            doubtful.append(f"GPU {index} is slowed down by its {why} at {temperature} C")
        if used.isdecimal() and total.isdecimal() and int(used) > BUSY_MEMORY_SHARE * int(total):
            doubtful.append(f"GPU {index} has {used} of {total} MiB taken")
        if not errors.isdecimal():
            untold.append(index)
        hottest = max(hottest, float(temperature) if temperature.isdecimal() else 0.0)
    if wrong:
        remedy = "reset the GPU, or leave this node out (--exclude)"
        return CheckResult(name=name, status="error", message="; ".join([*wrong, *doubtful]), remedy=remedy)
    if doubtful:
        remedy = (
            "look at cooling, power and who else is there (nvidia-smi), or leave this node out (--exclude)"
        )
        return CheckResult(name=name, status="warning", message="; ".join(doubtful), remedy=remedy)
    memory = "no uncorrected memory errors"
    if untold:
        memory += f" where they are counted (not on GPU {', '.join(untold)})"
    return CheckResult(name=name, status="ok", message=f"{memory}; hottest {hottest:.0f} C")


def check_peer_access() -> CheckResult:
    """Whether the GPUs of this node reach one another's memory."""
    name, count = "peer access", torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        return CheckResult(name=name, status="skipped", message=f"{count} GPUs here")
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    missing = [(a, b) for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    if missing:
        told = f"{len(missing)} of {len(pairs)} pairs have none, the first: GPU {missing[0][0]} to {missing[0][1]}"
        remedy = "NCCL goes through host memory there: look at `nvidia-smi topo -m`"
        return CheckResult(name=name, status="warning", message=told, remedy=remedy)
    return CheckResult(name=name, status="ok", message=f"all {len(pairs)} pairs")


def check_kernels() -> list[CheckResult]:
    """Native kernels on the CPU and, where there is a GPU, Triton and CUDA ones, beside the reference."""
    results = [_compare("native kernels, CPU", "native", torch.device("cpu"))]
    for backend, what in (("triton", "Triton kernels"), ("native", "CUDA kernels")):
        if torch.cuda.is_available():
            results.append(_compare(what, backend, torch.device("cuda")))
        else:
            results.append(CheckResult(name=what, status="skipped", message="they run on a GPU"))
    return results


def _compare(name: str, backend: str, device: torch.device) -> CheckResult:
    chosen = atomas_kernels.registry._chosen
    try:
        atomas_kernels.set_backend("reference")
        expected = _small_results(device)
        atomas_kernels.set_backend(backend)
        used = [op for op, by in atomas_kernels.active_backends(device).items() if by == backend]
        found = _small_results(device)
    except (RuntimeError, ImportError) as error:
        return CheckResult(
            name=name,
            status="warning",
            message=f"not available: {str(error).splitlines()[0]}",
            remedy="the reference is used instead, slowly: build with ATOMAS_BUILD_NATIVE=1, or mend triton",
        )
    finally:
        atomas_kernels.set_backend(chosen)
    for op, value in expected.items():
        scale = float(value.abs().max()) or 1.0
        deviation = float((found[op] - value).abs().max()) / scale
        if not deviation <= TOLERANCE:
            return CheckResult(
                name=name,
                status="error",
                message=f"{op} deviates from the reference by {deviation:.1e} of the largest value",
                remedy="do not train with them: run.kernels=reference, and report it",
            )
    return CheckResult(name=name, status="ok", message=f"{', '.join(used)} agree with the reference")


def _small_results(device: torch.device) -> dict[str, torch.Tensor]:
    """Clustering, merging and token interaction with gradient on a few random tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([5, 0, 17, 9], device=device)
    text = torch.randn(31, 32, generator=generator).to(device).requires_grad_()
    smiles = torch.randn(31, 32, generator=generator).to(device).requires_grad_()
    weight = atomas_kernels.segment_softmax(torch.randn(31, generator=generator).to(device), lengths)
    assignment, counts = atomas_kernels.dpc_knn(text, lengths, ratio=0.5)
    merged = atomas_kernels.cluster_merge(text, weight, assignment, lengths, counts)
    scores = atomas_kernels.token_interaction(text, smiles, weight, weight, lengths, lengths)
    (gradient,) = torch.autograd.grad((scores * scores).sum() + merged.square().sum(), text)
    found = {
        "dpc_knn": assignment,
        "cluster_merge": merged,
        "token_interaction": scores,
        "its gradient": gradient,
    }
    return {op: value.detach().double() for op, value in found.items()}


def check_nvme_offload() -> CheckResult:
    """DeepSpeed's operator for `deepspeed.offload: nvme`; nothing else needs it."""
    from atomas.training.nvme import operator_file

    name, file = "NVMe offload", operator_file()
    if file.exists():
        return CheckResult(name=name, status="ok", message=f"DeepSpeed's operator is compiled: {file}")
    if ctypes.util.find_library("aio") is None:
        message = (
            "deepspeed.offload = 'nvme' cannot be used here: libaio is missing (libaio-dev, libaio-devel)"
        )
    else:
        message = (
            "DeepSpeed's operator is not compiled: the first run with deepspeed.offload = 'nvme' does it"
        )
    return CheckResult(name=name, status="skipped", message=message)
