"""`atomas train`."""

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    """Add `atomas train` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser("train")
    parser.set_defaults(run=None)
