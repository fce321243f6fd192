"""`atomas export`: a checkpoint for other programs."""

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    """Add `atomas export` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "export",
        help="write a checkpoint as a Hugging Face directory",
        description="Write a directory that plain `transformers` loads and generates with: config.json,\n"
        "model.safetensors, generation_config.json and the tokenizer. The parts that transformers has no place for\n"
        "(poolers, hierarchy) go to its folder atomas/; `atomas import-checkpoint` makes a checkpoint of it again.",
        epilog="Example:\n  atomas export runs/mine --momentum --out exported\n"
        "  python -c \"from transformers import T5ForConditionalGeneration as T5; T5.from_pretrained('exported')\"",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run folder for its newest one"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--best", action="store_true", help="of a run folder take the best checkpoint")
    parser.add_argument(
        "--momentum", action="store_true", help="export the momentum copy of the encoder and decoder"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from atomas.training.export import export_checkpoint

    export_checkpoint(Path(args.checkpoint), Path(args.out), best=args.best, momentum=args.momentum)
    print(f"exported: {args.out}")
