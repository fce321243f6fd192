"""`atomas evaluate`."""

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    """Add `atomas evaluate` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser("evaluate")
    parser.set_defaults(run=None)
