"""`atomas data`: build, tokenize, index, inspect and fetch corpora; generate the demo corpus. Each is a module here."""

import argparse
import importlib
from typing import Any

COMMANDS = ("build", "tokenize", "verify", "index", "leakage", "inspect", "fetch", "demo")


def register(subparsers: Any) -> None:
    """Add `atomas data` and its sub-commands to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "data",
        help="pair files into shards; look at them; download; generate",
        description="Build, tokenize, index, inspect, fetch or generate corpora of molecule-text pairs.",
        epilog="Example: atomas data build pairs.tsv --out corpus --fractions train=0.9,validation=0.1",
    )
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"atomas.commands.data.{name}").register(commands)
