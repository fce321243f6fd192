"""`atomas demo`: the main job, end to end, on the generated corpus."""

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    """Add `atomas demo` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "demo",
        help="generate a corpus, train on it, evaluate, draw",
        description="Generate a corpus, train a small model on it with and without the hierarchical loss (2 ranks,\n"
        "ZeRO-2, on whatever hardware is there), evaluate both on held-out pairs, and draw the losses.\n"
        "What is finished already is not done again.",
        epilog="Examples:\n  atomas demo --out runs/demo\n"
        "  atomas demo --out runs/quick --pairs 1000 --training.max_steps 20",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", default="runs/demo", metavar="DIR", help="folder for everything (default: runs/demo)"
    )
    parser.add_argument(
        "--config", default="configs/train/demo.yaml", metavar="FILE", help="default: configs/train/demo.yaml"
    )
    parser.add_argument(
        "--pairs", type=int, default=10_000, metavar="N", help="pairs of the corpus (default: 10000)"
    )
    parser.set_defaults(run=_run, overrides=True)


def _run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from atomas.config_file import load_config

    load_config(args.config, args.overrides)  # a mistake is answered before anything is made
    from atomas.tasks.demo import run_demo

    run_demo(Path(args.out), Path(args.config), pairs=args.pairs, overrides=args.overrides)
