"""Compiles the CUDA sources for GPUs that need not be present and reads what their kernels use. Needs nvcc.

python -m atomas_kernels.cuda_resources --json cuda_resources.json
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES = (80, 90, 100)
FLAGS = ("-std=c++17", "-O3", "-fmad=false")
"""Those of setup.py that bear on the code of the kernels."""

_SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"


class Resources(NamedTuple):
    """What one compiled kernel uses, per thread or (shared) per block."""

    kernel: str
    architecture: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int


def sources() -> list[Path]:
    """The files that hold kernels."""
    return sorted(path for path in _SOURCES.glob("*.cu") if "__global__" in path.read_text(encoding="utf-8"))


def nvcc() -> str | None:
    """The compiler in CUDA_HOME or on the PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def compile_source(source: Path, architecture: int) -> list[Resources]:
    """Compile for compute capability `architecture` (80, 90, ...); one entry per kernel.

    Raises CalledProcessError, with the compiler's words in `stderr`, if it does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc() or "nvcc", *FLAGS, f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin"]
        report = _run(*command, str(source), "-o", f"{folder}/kernels.cubin").stderr
    return list(_kernels(_run("c++filt", input=report).stdout))


def _kernels(report: str) -> Iterator[Resources]:
    """Reads ptxas: a kernel's name and target, then its stack and spills, then registers and shared memory."""
    for part in report.split("Compiling entry function ")[1:]:
        name = re.search(r"::(\w+(?:<[^>]*>)?)\(", part)
        yield Resources(
            kernel=name.group(1) if name else part.splitlines()[0],
            architecture=_find(r"for '(sm_\w+)'", part),
            registers=int(_find(r"Used (\d+) registers", part)),
            stack_bytes=int(_find(r"(\d+) bytes stack frame", part)),
            spill_bytes=int(_find(r"(\d+) bytes spill stores", part))
            + int(_find(r"(\d+) bytes spill loads", part)),
            shared_bytes=int(_find(r"(\d+) bytes smem", part, missing="0")),
        )


def _find(pattern: str, text: str, missing: str | None = None) -> str:
    match = re.search(pattern, text)
    if match is None and missing is None:
        raise RuntimeError(f"ptxas did not report {pattern}")
    return match.group(1) if match else str(missing)


def _run(*command: str, input: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=input, capture_output=True, text=True, check=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile everything for every architecture and print or write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m atomas_kernels.cuda_resources",
        description="Compile the CUDA sources without a GPU and report registers, stack, spills and shared memory.",
        epilog="example: python -m atomas_kernels.cuda_resources --json cuda_resources.json",
    )
    parser.add_argument("--json", type=Path, help="file to write; standard output without it")
    options = parser.parse_args(arguments)
    compiler = nvcc()
    if compiler is None:
        parser.error("no nvcc found; put it on the PATH or set CUDA_HOME")
    version = _find(r"release [\d.]+, V([\d.]+)", _run(compiler, "--version").stdout)
    rows = [
        kernel._asdict()
        for source in sources()
        for architecture in ARCHITECTURES
        for kernel in compile_source(source, architecture)
    ]
    text = json.dumps({"nvcc": version, "flags": " ".join(FLAGS), "rows": rows}, indent=1)
    if options.json is None:
        print(text)
    else:
        options.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
