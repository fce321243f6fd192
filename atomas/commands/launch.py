"""`atomas launch`: start a command on one host or a cluster, with one process per GPU."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from atomas.errors import AtomasError

if TYPE_CHECKING:
    from atomas_launcher.cli import Run


def register(subparsers: Any) -> None:
    """Add `atomas launch` to the command line."""
    from atomas_launcher.cli import DESCRIPTION, EPILOG, add_arguments

    parser: argparse.ArgumentParser = subparsers.add_parser(
        "launch",
        help="start a command on one host or a cluster",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.set_defaults(run=_run, overrides=True)


def _run(args: argparse.Namespace) -> None:
    from atomas_launcher.cli import run
    from atomas_launcher.errors import LaunchError

    if args.overrides:
        raise AtomasError(
            f"{args.overrides[0]!r} is no option of launch; options of the command stand after --"
        )
    try:
        sys.exit(run(args, _describe))
    except LaunchError as error:
        raise AtomasError(str(error)) from None


def _describe(command: Sequence[str]) -> "Run | None":
    """What the configuration of `train ...` says; None for other commands."""
    if not command or command[0] != "train":
        return None
    from pathlib import Path

    from atomas.config_file import load_config
    from atomas_launcher.cli import Run

    parser = argparse.ArgumentParser(prog="atomas train", add_help=False)
    parser.add_argument("--config")
    args, overrides = parser.parse_known_args(command[1:])
    config = load_config(args.config, overrides)
    return Run(
        name=config.run.name,
        directory=Path(config.run.output_dir) / config.run.name,
        batch_size=config.data.batch_size,
        micro_batch_size=config.training.micro_batch_size,
        accumulation=config.training.gradient_accumulation_steps,
        max_steps=config.training.max_steps,
    )
