"""Maps the three packages from their folders and compiles `atomas_kernels._native` and the CUDA library.

The native module is optional: without a C++ compiler the install goes on in pure Python, with a warning.
`ATOMAS_BUILD_NATIVE=0` leaves it out, `ATOMAS_BUILD_NATIVE=1` makes a failure to build it an error.
The CUDA library is built where nvcc is found, in CUDA_HOME or on the PATH; torch is not asked, because a build in
isolation does not see it. `ATOMAS_BUILD_CUDA` is the same choice for it.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("csrc")
COMMON_SOURCES = ["module.cpp", "cpu/parallel.cpp"]
# Compiled once per instruction set; the fastest that the processor has is chosen at run time.
INTERACTION_SOURCES = ["cpu/interaction_forward.cpp", "cpu/interaction_backward.cpp"]
KERNEL_SOURCES = [
    *INTERACTION_SOURCES,
    "cpu/clustering.cpp",
    "cpu/contrastive.cpp",
    "cpu/attention.cpp",
    "cpu/dropout.cpp",
]
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma"
INSTRUCTION_SETS = {"baseline": ""} | ({"avx2": "-mavx2 -mfma", "avx512": AVX512} if X86 else {})
# The token interaction with tile registers for bfloat16, and with tiles in plain code for the tests.
AMX = f"-DATOMAS_AMX {AVX512} -mavx512bf16 -mamx-tile -mamx-bf16"
AMX_EMULATED = "-DATOMAS_AMX -DATOMAS_AMX_EMULATED"
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast"
CUDA_SOURCES = ["cuda/clustering.cu", "cuda/merging.cu", "cuda/momentum.cu", "cuda/errors.cu"]
# Compute capabilities with code of their own, where this nvcc knows them; later GPUs translate the last one's PTX.
CUDA_ARCHITECTURES = (80, 90, 100)
# No contraction: a product is rounded once only where the source says fmaf.
CUDA_FLAGS = "-std=c++17 -O3 -fmad=false -cudart static --threads 0 -Xcompiler -fPIC,-fvisibility=hidden"

NATIVE, CUDA = "atomas_kernels._native", "atomas_kernels.libatomas_cuda"
WISHES = {
    NATIVE: os.environ.get("ATOMAS_BUILD_NATIVE", "auto"),
    CUDA: os.environ.get("ATOMAS_BUILD_CUDA", "auto"),
}


class NinjaBuild(build_ext):
    """Writes a ninja file with each source's own flags and runs it."""

    def get_ext_filename(self, name: str) -> str:
        # No Python module, so the interpreter's suffix would only mislead.
        is_library = name.rpartition(".")[2] == CUDA.rpartition(".")[2]
        return name.replace(".", os.sep) + ".so" if is_library else super().get_ext_filename(name)

    def build_extension(self, ext: Extension) -> None:
        build = self._build_cuda if ext.name == CUDA else self._build_native
        try:
            build(Path(self.get_ext_fullpath(ext.name)).resolve())
        except (CompileError, ImportError, OSError, subprocess.CalledProcessError) as error:
            message = f"{ext.name} was not built ({error})"
            if WISHES[ext.name] == "1":
                raise SystemExit(message) from error
            raise CompileError(f"{message}; its operators run on another backend") from error

    def _build_native(self, output: Path) -> None:
        import pybind11

        compiler = (
            os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        )
        if not compiler:
            raise CompileError("no C++ compiler found; install g++ or set CXX")
        includes = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"
        compile_command = f"{compiler} {FLAGS} {includes} $flags -MMD -MF $out.d -c $in -o $out"
        with self._ninja("native", output) as writer:
            writer.rule("compile", compile_command, depfile="$out.d", deps="gcc")
            writer.rule("link", f"{compiler} -shared -pthread $in -o $out")
            objects = []

            def compile_source(source: str, product: str, flags: str) -> None:
                objects.append(product)
                writer.build(product, "compile", str((CSRC / source).resolve()), variables={"flags": flags})

            with_amx = X86 and _knows_amx(compiler)
            for source in COMMON_SOURCES:
                defines = "-DATOMAS_X86" * X86 + " -DATOMAS_HAS_AMX" * with_amx
                compile_source(source, Path(source).with_suffix(".o").name, defines)
            sets = [(name, flags, KERNEL_SOURCES) for name, flags in INSTRUCTION_SETS.items()]
            sets.append(("amx_emulated", AMX_EMULATED, INTERACTION_SOURCES))
            if with_amx:
                sets.append(("amx_bf16", AMX, INTERACTION_SOURCES))
            for name, flags, sources in sets:
                for source in sources:
                    compile_source(source, f"{Path(source).stem}.{name}.o", f"-DATOMAS_ISA={name} {flags}")
            writer.build(str(output), "link", objects)

    def _build_cuda(self, output: Path) -> None:
        compiler = _nvcc()
        if not compiler:
            raise CompileError("no nvcc found; put it on the PATH or set CUDA_HOME")
        command = f"{compiler} {CUDA_FLAGS} {_gencode(compiler)} -MD -MF $out.d -c $in -o $out"
        # The CUDA runtime's names stay inside: torch has loaded its own.
        link_command = f"{compiler} -shared -cudart static -Xlinker --exclude-libs,ALL $in -o $out"
        with self._ninja("cuda", output) as writer:
            writer.rule("compile", command, depfile="$out.d", deps="gcc")
            writer.rule("link", link_command)
            objects = [Path(source).with_suffix(".o").name for source in CUDA_SOURCES]
            for source, product in zip(CUDA_SOURCES, objects, strict=True):
                writer.build(product, "compile", str((CSRC / source).resolve()))
            writer.build(str(output), "link", objects)

    @contextmanager
    def _ninja(self, name: str, output: Path) -> Iterator[Any]:
        """Runs the ninja file that is written inside."""
        import ninja
        from ninja import ninja_syntax

        folder = Path(self.build_temp).resolve() / name
        folder.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        with (folder / "build.ninja").open("w") as file:
            yield ninja_syntax.Writer(file)
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja")], cwd=folder, check=True)


def _knows_amx(compiler: str) -> bool:
    """Whether compiler and assembler take the flags and instructions of AMX; permission is asked of Linux."""
    if not sys.platform.startswith("linux"):
        return False
    command = [compiler, *AMX.split(), "-x", "c++", "-c", "-", "-o", os.devnull]
    program = 'int main() { asm volatile("tdpbf16ps %tmm2, %tmm1, %tmm0"); }'
    return subprocess.run(command, input=program, text=True, capture_output=True).returncode == 0


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def _gencode(nvcc: str) -> str:
    listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    known = [number for number in CUDA_ARCHITECTURES if f"compute_{number}" in listed.split()]
    if not known:
        raise CompileError(f"{nvcc} knows none of the architectures {CUDA_ARCHITECTURES}")
    targets = [f"arch=compute_{number},code=sm_{number}" for number in known]
    targets.append(f"arch=compute_{known[-1]},code=compute_{known[-1]}")
    return " ".join(f"-gencode {target}" for target in targets)


def _extensions() -> list[Extension]:
    headers = sorted(str(path) for path in CSRC.rglob("*.h"))
    sources = {NATIVE: COMMON_SOURCES + KERNEL_SOURCES, CUDA: CUDA_SOURCES}
    wanted = [name for name, wish in WISHES.items() if wish != "0"]
    if WISHES[CUDA] != "1" and not _nvcc():
        wanted = [name for name in wanted if name != CUDA]
    return [
        Extension(
            name,
            [str(CSRC / source) for source in sources[name]],
            depends=headers,
            optional=WISHES[name] != "1",
        )
        for name in wanted
    ]


setup(
    packages=[
        *find_packages(include=["atomas", "atomas.*"]),
        *find_packages("kernels"),
        *find_packages("launcher"),
    ],
    package_dir={
        "atomas_kernels": "kernels/atomas_kernels",
        "atomas_launcher": "launcher/atomas_launcher",
    },
    ext_modules=_extensions(),
    cmdclass={"build_ext": NinjaBuild},
)
