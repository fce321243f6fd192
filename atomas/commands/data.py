"""`atomas data`."""

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    """Add `atomas data` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser("data")
    parser.set_defaults(run=None)
