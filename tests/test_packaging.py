"""What is imported is declared, what is declared is used, and the repository speaks of the project alone."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "atomas": "atomas",
    "atomas_kernels": "kernels/atomas_kernels",
    "atomas_launcher": "launcher/atomas_launcher",
}
IMPORT_NAMES = {
    "pyyaml": "yaml",
    "rouge-score": "rouge_score",
    "kubeflow-trainer-api": "kubeflow_trainer_api",
    "mosaicml-streaming": "streaming",
}
TOOLS = {"ruff", "mypy", "pytest", "pytest-xdist"} | {
    "s3fs",
    "flask",
    "flask-cors",
}  # run, not imported; imported by fsspec and moto


def imports(folder: Path) -> set[str]:
    found = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names)


def declared(names: list[str]) -> set[str]:
    plain = (re.match(r"[A-Za-z0-9_-]+", name).group().lower() for name in names)  # type: ignore[union-attr]
    return {IMPORT_NAMES.get(name, name) for name in plain}


def test_imports_are_exactly_what_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    used = set().union(*(imports(ROOT / folder) for folder in PACKAGES.values())) - set(PACKAGES)
    extras = project["optional-dependencies"]
    peers = declared(extras["data-peers"])
    assert used - peers == declared(project["dependencies"])
    assert peers <= used
    development = {name for name in declared(extras["dev"]) if not name.startswith("types-")}
    in_tests = imports(ROOT / "tests") - set(PACKAGES) - {"tests"}
    assert in_tests - used <= development
    assert development <= in_tests | TOOLS


def test_standalone_packages() -> None:
    assert imports(ROOT / PACKAGES["atomas_launcher"]) <= {"atomas_launcher", "yaml"}
    assert imports(ROOT / PACKAGES["atomas_kernels"]) <= {"atomas_kernels", "torch", "triton", "numpy"}


def test_constraints_pin_what_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {
        IMPORT_NAMES.get(name, name)
        for name in (line.split("==")[0].lower() for line in pins if "==" in line)
    }
    wanted = declared(project["dependencies"]) | declared(project["optional-dependencies"]["dev"])
    assert {name.lower() for name in wanted} - pinned == {"triton"}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_has_a_docstring(package: str) -> None:
    for file in (ROOT / PACKAGES[package]).rglob("*.py"):
        assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), file


def test_no_absolute_paths_of_a_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        path = ROOT / name
        if (
            path.suffix in {".py", ".md", ".yaml", ".toml", ".json", ".sh", ".cpp", ".h", ".cu"}
            and path.is_file()
        ):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(?<![\w.])/(work|root|home)/", text), name
