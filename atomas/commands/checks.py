"""What commands check of their options before anything heavy is loaded; a mistake is one line."""

import argparse
import os
from pathlib import Path

from atomas.errors import AtomasError


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Raise AtomasError for one of these options that is given and below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise AtomasError(f"--{name.replace('_', '-')} {value}: at least 1 is needed")


def is_seed(args: argparse.Namespace) -> None:
    """Raise AtomasError for a negative `--seed`."""
    if args.seed < 0:
        raise AtomasError(f"--seed {args.seed}: a seed is not negative")


def can_be_written(option: str, file: Path | None) -> None:
    """Raise AtomasError, naming `option`, where `file` is given and has no folder that takes it."""
    if file is None:
        return
    if file.is_dir():
        raise AtomasError(f"{option} {file}: it is a folder, and a file is needed")
    if not file.parent.is_dir():
        raise AtomasError(f"{option} {file}: the folder {file.parent} does not exist")
    if not os.access(file.parent, os.W_OK):
        raise AtomasError(f"{option} {file}: the folder {file.parent} cannot be written to")
