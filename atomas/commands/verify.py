"""`atomas verify`."""

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    """Add `atomas verify` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser("verify")
    parser.set_defaults(run=None)
