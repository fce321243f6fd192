"""A launch whose processes are stand-ins, in a folder of its own."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from atomas_launcher.placement import launcher_variables

ROOT = Path(__file__).parents[2]
HOSTILE = (
    "a b",
    "$(touch pwned)",
    "`touch pwned`",
    "'; touch pwned; '",
    '"$HOME"',
    "back\\slash",
    "*",
    "#x",
    "-",
)
"""Arguments that a shell would act on."""


class Launch:
    """`atomas launch` with `python -m atomas` replaced by tests/launcher/stand_in.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "runs" / "mine"
        python = folder / "python"
        stand_in = Path(__file__).with_name("stand_in.py")
        python.write_text(
            "#!/bin/bash\n"
            f"interpreter={shlex.quote(sys.executable)}\n"
            # what doctor would say of a run that ended
            f'if [ "$4" = {shlex.quote(str(self.run))} ] && [ "$3" = doctor ]; then cat autopsy.json; exit; fi\n'
            # and of a node
            'if [ "$3" = doctor ]; then [ "$SLURMD_NODENAME" != "$UNWELL" ]; exit; fi\n'
            f'if [ "$2" = atomas ]; then exec "$interpreter" {shlex.quote(str(stand_in))} "${{@:4}}"; fi\n'
            'exec "$interpreter" "$@"\n',
            encoding="utf-8",
        )
        python.chmod(0o755)
        self.python = python

    def profile(self, text: str) -> Path:
        """A profile with the stand-in for its interpreter."""
        path = self.folder / "profile.yaml"
        path.write_text(f"python: {self.python}\ndevice: cpu\n{text}", encoding="utf-8")
        return path

    def command(self, *options: str) -> list[str]:
        return [sys.executable, "-m", "atomas_launcher", *options]

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Of a plain shell, with state and packages found in the right places."""
        outer = (*launcher_variables(), "SLURM_", "OMPI_", "PMI")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
        path = f"{ROOT}:{ROOT / 'launcher'}"
        root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        state = {"XDG_STATE_HOME": str(self.folder / "state"), "PYTHONPATH": path}
        return {**clean, **root, **state, **(more or {})}

    def __call__(self, *options: str, code: int = 0, environ: Mapping[str, str] | None = None) -> str:
        """Standard output of a launch that must end with `code`; what went wrong where it does not."""
        done = subprocess.run(
            self.command(*options), env=self.environment(environ), cwd=self.folder, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == code, f"{done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    return Launch(tmp_path)
