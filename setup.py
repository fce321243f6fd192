"""Maps the three packages from their folders and compiles `atomas_kernels._native`.

The native module is optional: without a C++ compiler the install goes on in pure Python, with a warning.
`ATOMAS_BUILD_NATIVE=0` leaves it out, `ATOMAS_BUILD_NATIVE=1` makes a failure to build it an error.
"""

import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("csrc")
COMMON_SOURCES = ["module.cpp", "cpu/parallel.cpp"]
# Compiled once per instruction set; the fastest that the processor has is chosen at run time.
KERNEL_SOURCES = ["cpu/interaction_forward.cpp", "cpu/interaction_backward.cpp", "cpu/clustering.cpp"]
X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = {"baseline": ""} | (
    {"avx2": "-mavx2 -mfma", "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma"} if X86 else {}
)
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast"
WISH = os.environ.get("ATOMAS_BUILD_NATIVE", "auto")


class NinjaBuild(build_ext):
    """Writes a ninja file with each source's own flags and runs it."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(Path(self.get_ext_fullpath(ext.name)).resolve())
        except (CompileError, ImportError, OSError, subprocess.CalledProcessError) as error:
            message = f"atomas_kernels._native was not built ({error})"
            if WISH == "1":
                raise SystemExit(message) from error
            raise CompileError(f"{message}; the slower pure Python operators are used") from error

    def _build(self, output: Path) -> None:
        import ninja
        import pybind11
        from ninja import ninja_syntax

        compiler = (
            os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        )
        if not compiler:
            raise CompileError("no C++ compiler found; install g++ or set CXX")
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        includes = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"
        with (folder / "build.ninja").open("w") as file:
            writer = ninja_syntax.Writer(file)
            compile_command = f"{compiler} {FLAGS} {includes} $flags -MMD -MF $out.d -c $in -o $out"
            writer.rule("compile", compile_command, depfile="$out.d", deps="gcc")
            writer.rule("link", f"{compiler} -shared -pthread $in -o $out")
            objects = []
            for source in COMMON_SOURCES:
                objects.append(Path(source).with_suffix(".o").name)
                writer.build(objects[-1], "compile", str((CSRC / source).resolve()), variables=_defines())
            for name, flags in INSTRUCTION_SETS.items():
                for source in KERNEL_SOURCES:
                    objects.append(f"{Path(source).stem}.{name}.o")
                    variables = {"flags": f"-DATOMAS_ISA={name} {flags}"}
                    writer.build(objects[-1], "compile", str((CSRC / source).resolve()), variables=variables)
            writer.build(str(output), "link", objects)
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja")], cwd=folder, check=True)


def _defines() -> dict[str, str]:
    return {"flags": "-DATOMAS_X86"} if X86 else {}


def _extensions() -> list[Extension]:
    if WISH == "0":
        return []
    sources = [str(CSRC / source) for source in COMMON_SOURCES + KERNEL_SOURCES]
    headers = sorted(str(path) for path in CSRC.rglob("*.h"))
    return [Extension("atomas_kernels._native", sources, depends=headers, optional=WISH != "1")]


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
