"""`atomas generate`: a molecule for a text, a caption for a SMILES."""

import argparse
import sys
from pathlib import Path
from typing import Any

from atomas.commands.checks import at_least_one, can_be_written
from atomas.commands.decoding_options import add_checkpoint_options, add_decoding_options, decoding_settings


def register(subparsers: Any) -> None:
    """Add `atomas generate` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "generate",
        help="write a molecule for a text, or a caption for a SMILES",
        description="Write a molecule for a text, or a caption for a SMILES. Molecules are checked with RDKit;\n"
        "outputs of one input that are the same are marked.",
        epilog="Examples:\n"
        "  atomas generate --checkpoint runs/demo/hierarchical --text 'The molecule is a primary alcohol.'\n"
        "  atomas generate --checkpoint runs/demo/hierarchical --input texts.txt --write molecules \\\n"
        "      --num-return-sequences 5 --out molecules.jsonl\n"
        "  atomas generate --checkpoint runs/captions --smiles 'CCO' --sample --temperature 0.8",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--text", metavar="TEXT", help="write a molecule for this text")
    inputs.add_argument("--smiles", metavar="SMILES", help="write a caption for this molecule")
    inputs.add_argument(
        "--input", type=Path, metavar="FILE", help="one input on each line; - reads standard input"
    )
    parser.add_argument(
        "--write",
        choices=("molecules", "captions"),
        help="what to write for --input: its lines are the other",
    )
    add_checkpoint_options(parser)
    parser.add_argument(
        "--num-return-sequences", type=int, default=1, metavar="N", help="outputs for each input, best first"
    )
    add_decoding_options(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write JSON lines instead of showing the outputs"
    )
    parser.set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> None:
    at_least_one(args, "batch_size")
    can_be_written("--out", args.out)

    from atomas.distributed.process_group import resolve_device
    from atomas.errors import AtomasError
    from atomas.tasks.decoding import Task, Writer, warn_of_other_task
    from atomas.tasks.generation import print_outputs, write_outputs
    from atomas.tasks.inputs import Kind, read_inputs
    from atomas.training.checkpoint import resolve_checkpoint, verify_checkpoint
    from atomas.training.model_files import read_model

    if (args.input is None) != (args.write is None):
        raise AtomasError("--write molecules or --write captions goes with --input, and only with it")
    settings = decoding_settings(args, num_return_sequences=args.num_return_sequences)
    kind: Kind = "text" if args.text is not None or args.write == "molecules" else "smiles"
    value = args.text if args.text is not None else args.smiles
    inputs = read_inputs(kind, value=value, file=args.input)
    folder = resolve_checkpoint(Path(args.checkpoint), best=args.best)
    verify_checkpoint(folder)
    device = resolve_device(args.device, 0)
    model, tokenizer, config = read_model(folder, momentum=args.momentum)
    task: Task = "generation" if kind == "text" else "captioning"
    writer = Writer(model.to(device), tokenizer, settings, task=task, device=device)
    warn_of_other_task(task, config.loss.task, folder)
    hidden = args.out is None and sys.stdout.isatty()
    print_outputs(write_outputs(writer, inputs, batch_size=args.batch_size, hidden=hidden), args.out)
