"""Compiles the Triton kernels for GPUs that need not be present, reads what they use, and judges it.

python -m atomas_kernels.aot --check --json docs/results/kernel_resources.json
"""

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

import atomas_kernels.triton
from atomas_kernels.triton.variants import ARCHITECTURES, Variant

REGISTERS = 255
"""Most registers that a thread can have."""
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Most shared memory that a program can have, by compute capability."""

_TENSOR_CORE = r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b"

Row = dict[str, Any]
"""One variant on one architecture; `error` in place of the figures where it does not compile."""


@cache
def variants(architecture: int) -> dict[str, Variant]:
    """Everything that the Triton modules launch on compute capability `architecture`, by name."""
    found: dict[str, Variant] = {}
    for module in pkgutil.iter_modules(atomas_kernels.triton.__path__):
        loaded = importlib.import_module(f"{atomas_kernels.triton.__name__}.{module.name}")
        if hasattr(loaded, "variants"):
            for variant in loaded.variants(architecture):
                if variant.name in found:
                    raise ValueError(f"two variants have the name {variant.name}")
                found[variant.name] = variant
    return found


def main_variants(architecture: int) -> list[str]:
    """The first variant of every kernel: enough to notice a kernel that no longer compiles well."""
    first: dict[str, str] = {}
    for name, variant in variants(architecture).items():
        first.setdefault(variant.kernel.__name__, name)
    return list(first.values())


def describe(name: str, architecture: int) -> Row:
    """What identifies a variant in a report: name, architecture, constants and options, as JSON holds them."""
    variant = variants(architecture)[name]
    return {
        "kernel": name,
        "architecture": f"sm_{architecture}",
        "constants": variant.constants,
        "warps": variant.options["num_warps"],
        "stages": variant.options["num_stages"],
    }


def measure(name: str, architecture: int) -> Row:
    """Compile one variant and read registers and stack per thread, shared memory per program, instructions."""
    row = describe(name, architecture)
    try:
        # A failing ptxas has its whole input printed.
        with contextlib.redirect_stdout(io.StringIO()):
            compiled = _compile(variants(architecture)[name], architecture)
    except Exception as error:  # whatever stops a compiler is what the report is about
        return row | {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        code = _cuobjdump("--dump-sass", file.name)
    return row | {
        "registers": _number(r"REG:(\d+)", usage),
        "stack_bytes": _number(r"STACK:(\d+)", usage),
        "shared_bytes": compiled.metadata.shared,
        "spill_instructions": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "tensor_core_instructions": len(re.findall(_TENSOR_CORE, code)),
    }


def _compile(variant: Variant, architecture: int) -> CompiledKernel:
    parameters = variant.kernel.arg_names
    types = {name: kind.partition(":")[0] for name, kind in variant.signature.items()}
    aligned = [name for name, kind in variant.signature.items() if kind[0] == "*" or kind.endswith(":16")]
    source = ASTSource(
        fn=variant.kernel,
        signature={name: types.get(name, "constexpr") for name in parameters},
        constexprs={(parameters.index(name),): value for name, value in variant.constants.items()},
        attrs={(parameters.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=variant.options)


def _cuobjdump(option: str, path: str) -> str:
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(binary), option, path], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"cuobjdump did not report {pattern}")
    return int(match.group(1))


def violations(row: Row) -> list[str]:
    """What is wrong with a measured row, one line each."""
    where = f"{row['kernel']} on {row['architecture']}"
    if "error" in row:
        return [f"{where}: does not compile: {row['error']}"]
    architecture = int(row["architecture"].removeprefix("sm_"))
    known = variants(architecture).get(row["kernel"])
    found = []
    if row["registers"] > REGISTERS:
        found.append(f"{where}: {row['registers']} registers")
    if row["stack_bytes"] or row["spill_instructions"]:
        spills, stack = row["spill_instructions"], row["stack_bytes"]
        found.append(f"{where}: spills ({stack} bytes of stack, {spills} local loads and stores)")
    if row["shared_bytes"] > SHARED_BYTES[architecture]:
        found.append(f"{where}: {row['shared_bytes']} bytes of shared memory")
    if known is not None and known.tensor_cores and not row["tensor_core_instructions"]:
        found.append(f"{where}: no tensor core instruction")
    return found


def measure_all(work: Sequence[tuple[str, int]], workers: int) -> Iterator[Row]:
    """Rows for (variant, architecture) pairs in their order, compiled by `workers` processes."""
    # fork: the children have torch and triton imported already.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(max_workers=workers, mp_context=context) as pool:
        names, architectures = zip(*work, strict=True)
        yield from pool.map(measure, names, architectures)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, show a line per variant, write the table; with --check name every violation."""
    parser = argparse.ArgumentParser(
        prog="python -m atomas_kernels.aot",
        description="Compile the Triton kernels without a GPU and report registers, stack and shared memory.",
        epilog="example: python -m atomas_kernels.aot --arch 90 --only dpc_knn --check",
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--only", metavar="NAME", help="variants whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write")
    parser.add_argument("--check", action="store_true", help="exit with 1 and name each violation")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args(arguments)
    work = [(name, a) for a in options.arch for name in variants(a) if (options.only or "") in name]
    if not work:
        parser.error(f"no variant has {options.only!r} in its name")

    rows = []
    for row in measure_all(work, options.workers):
        rows.append(row)
        print(f"{len(rows)}/{len(work)}", _line(row), file=sys.stderr, flush=True)
    if options.json is not None:
        report = {"triton": triton.__version__, "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    found = [violation for row in rows for violation in violations(row)]
    print(*found, sep="\n", end="\n" if found else "")
    return int(options.check and bool(found))


def _line(row: Row) -> str:
    if "error" in row:
        return f"{row['kernel']} {row['architecture']} {row['error']}"
    return (
        f"{row['kernel']} {row['architecture']}: {row['registers']} registers, {row['stack_bytes']} B stack, "
        f"{row['shared_bytes'] / 1024:.0f} KiB shared, {row['spill_instructions']} spills, "
        f"{row['tensor_core_instructions']} on tensor cores"
    )


if __name__ == "__main__":
    sys.exit(main())
