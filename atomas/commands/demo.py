"""`atomas demo`."""

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    """Add `atomas demo` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser("demo")
    parser.set_defaults(run=None)
