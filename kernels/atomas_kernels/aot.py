"""Compiles the Triton kernels for GPUs that need not be present and reads what they use.

python -m atomas_kernels.aot --json resources.json
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from atomas_kernels.triton import clustering

ARCHITECTURES = (80, 90)


class Configuration(NamedTuple):
    """One kernel with its compile-time constants."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, int]
    options: dict[str, int]


class Resources(NamedTuple):
    """What one compiled kernel uses, per thread or (shared) per program."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    spill_instructions: int
    tensor_core_instructions: int


def configurations() -> Iterator[Configuration]:
    """Every kernel and configuration that the backend can launch."""
    signature = {"tokens": "*fp32", "lengths": "*i64", "ends": "*i64", "counts": "*i64", "assignment": "*i64"}
    signature |= {"width": "i32", "k": "i32", "SIZE": "constexpr", "BLOCK_D": "constexpr"}
    for size in (16, 32, 64, 128):
        constants = {"SIZE": size, "BLOCK_D": clustering.BLOCK_D}
        options = clustering.launch_options(size)
        yield Configuration(f"dpc_knn[{size}]", clustering.cluster_kernel, signature, constants, options)


def compile_for(configuration: Configuration, architecture: int) -> Resources:
    """Compile for compute capability `architecture` (80, 90, ...) and count registers, stack and
    instructions.
    """
    names = list(configuration.signature)
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(configuration.signature.values())
        if kind[0] == "*"
    }
    source = ASTSource(
        fn=configuration.kernel,
        signature=configuration.signature,
        constexprs={(names.index(name),): value for name, value in configuration.constants.items()},
        attrs=divisible,
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options=configuration.options
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        code = _cuobjdump("--dump-sass", file.name)
    return Resources(
        registers=_number(r"REG:(\d+)", usage),
        stack_bytes=_number(r"STACK:(\d+)", usage),
        shared_bytes=compiled.metadata.shared,
        spill_instructions=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        tensor_core_instructions=len(re.findall(r"\b(?:HMMA|HGMMA)\b", code)),
    )


def _cuobjdump(option: str, path: str) -> str:
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(binary), option, path], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"cuobjdump did not report {pattern}")
    return int(match.group(1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile everything for every architecture and print or write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m atomas_kernels.aot",
        description="Compile the Triton kernels without a GPU and report registers, stack and shared memory.",
        epilog="example: python -m atomas_kernels.aot --json resources.json",
    )
    parser.add_argument("--json", type=Path, help="file to write; standard output without it")
    options = parser.parse_args(arguments)
    rows = []
    for configuration in configurations():
        for architecture in ARCHITECTURES:
            resources = compile_for(configuration, architecture)
            rows.append(
                {"kernel": configuration.name, "architecture": f"sm_{architecture}"} | resources._asdict()
            )
            print(rows[-1], file=sys.stderr, flush=True)
    text = json.dumps({"triton": triton.__version__, "rows": rows}, indent=1)
    if options.json is None:
        print(text)
    else:
        options.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
