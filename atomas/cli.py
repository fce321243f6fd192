"""The command `atomas`: parse, hand over to a sub-command, turn a user's mistake into one line."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from atomas.errors import AtomasError
from atomas.version import __version__

COMMANDS = (
    "data",
    "plan",
    "train",
    "launch",
    "report",
    "evaluate",
    "generate",
    "embed",
    "visualize",
    "import_checkpoint",
    "export",
    "doctor",
    "verify",
    "config",
    "bench",
    "demo",
)


def command_parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = argparse.ArgumentParser(
        prog="atomas",
        description="Train molecule-text models with hierarchical adaptive alignment.",
        epilog="Example: atomas data demo --pairs 1000 --out corpus && atomas data inspect corpus",
    )
    parser.add_argument("--version", action="version", version=f"atomas {__version__}")
    # the deepspeed launcher puts it before the command; the placement comes from the environment
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"atomas.commands.{name}").register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `atomas ARGS`; exit code 0 on success, 2 on a user's mistake, 130 on interrupt."""
    parser = command_parser()
    args, overrides = parser.parse_known_args(argv)
    if overrides and not getattr(args, "overrides", False):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    args.overrides = overrides  # --section.field value, for the commands that take a configuration
    try:
        args.run(args)
    except AtomasError as error:
        sys.exit(_fail(str(error)))
    except KeyboardInterrupt:
        print("\natomas: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


def _fail(message: str) -> int:
    print(f"atomas: error: {message}", file=sys.stderr)
    return 2
