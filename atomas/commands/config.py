"""`atomas config`."""

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    """Add `atomas config` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser("config")
    parser.set_defaults(run=None)
