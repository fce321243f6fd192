"""`atomas train`: one process of a training run; a launcher starts as many as there are ranks."""

import argparse
import sys
from typing import Any


def register(subparsers: Any) -> None:
    """Add `atomas train` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "train",
        help="train a model, or continue a run",
        description="Train a model. Every key of the configuration is an option: --section.field value\n"
        "(`atomas config keys` lists them). A run that has a checkpoint is continued.",
        epilog="Examples:\n"
        "  atomas train --config configs/train/demo.yaml --run.name mine\n"
        "  torchrun --nproc-per-node 2 -m atomas train --config configs/train/demo.yaml --deepspeed.zero_stage 3\n"
        "  srun --kill-on-bad-exit=1 --ntasks-per-node 8 python -m atomas train --config FILE\n"
        "\nExit code: 0 done, 2 a mistake in the input or senseless numbers, 75 stopped by a signal or\n"
        "a KILL file: start it again to continue, 76 another rank died, failed or hung.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file; without it, the defaults")
    parser.set_defaults(run=_run, overrides=True)


def _run(args: argparse.Namespace) -> None:
    from atomas.config_file import load_config

    config = load_config(args.config, args.overrides)
    from atomas.data.storage import open_storage
    from atomas.errors import AtomasError

    for corpus in config.data.corpora:  # before torch is imported: seconds matter here
        folder = open_storage(corpus, config.storage).folder
        if folder is not None and not (folder / "index.json").is_file():
            raise AtomasError(
                f"data.corpus = {corpus!r} is not a corpus (it has no index.json); "
                "make one with `atomas data build` or `atomas data demo`"
            )
    from atomas.training.stop_signal import StopSignal

    with StopSignal() as stop:
        from atomas.training.loop import train

        code = train(config, stop)
    sys.exit(code)
