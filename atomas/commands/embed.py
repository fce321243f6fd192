"""`atomas embed`: features of texts or molecules for use in other programs."""

import argparse
from pathlib import Path
from typing import Any

from atomas.commands.checks import at_least_one, can_be_written
from atomas.commands.decoding_options import add_checkpoint_options


def register(subparsers: Any) -> None:
    """Add `atomas embed` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "embed",
        help="features of texts or molecules as Parquet or NPZ",
        description="Global features of texts or molecules, one on each line of a file. Features have length 1: the\n"
        "inner product of a text's and a molecule's is their similarity. Columns: line (of the file, from 1),\n"
        "input, feature. Lines that are no molecule are told on standard error and left out.",
        epilog="Examples:\n"
        "  atomas embed --checkpoint runs/demo/hierarchical --input mols.smi --kind smiles --out mols.parquet\n"
        "  atomas embed --checkpoint runs/demo/hierarchical --input texts.txt --kind text --out texts.npz",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input",
        required=True,
        type=Path,
        metavar="FILE",
        help="one input on each line; - reads standard input",
    )
    parser.add_argument("--kind", required=True, choices=("smiles", "text"), help="what the lines are")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="a .parquet or .npz file")
    add_checkpoint_options(parser)
    parser.set_defaults(run=_embed)


def _embed(args: argparse.Namespace) -> None:
    at_least_one(args, "batch_size")
    can_be_written("--out", args.out)

    from atomas.distributed.process_group import resolve_device
    from atomas.errors import AtomasError
    from atomas.tasks.embedding import FORMATS, embed, write_embeddings
    from atomas.tasks.inputs import read_inputs, without_long
    from atomas.training.checkpoint import resolve_checkpoint, verify_checkpoint
    from atomas.training.model_files import read_model

    if args.out.suffix not in FORMATS:
        raise AtomasError(f"--out {args.out}: the ending must be {' or '.join(FORMATS)}")
    inputs = read_inputs(args.kind, file=args.input)
    folder = resolve_checkpoint(Path(args.checkpoint), best=args.best)
    manifest = verify_checkpoint(folder)
    device = resolve_device(args.device, 0)
    model, tokenizer, config = read_model(folder, momentum=args.momentum)
    if args.kind == "smiles":  # a text is cut, but a part of a SMILES is no molecule
        lengths = [len(ids) for ids in tokenizer.encode_batch(inputs.values)]
        inputs = without_long(inputs, lengths, config.longest_smiles)
    features = embed(
        model.to(device), tokenizer, inputs,
        max_text_tokens=config.data.max_text_tokens, batch_size=args.batch_size, device=device,
    )  # fmt: skip
    about = {
        "checkpoint": args.checkpoint,
        "step": manifest["step"],
        "weights": "momentum" if args.momentum else "online",
        "tokenizer": tokenizer.fingerprint,
        "kind": args.kind,
    }
    write_embeddings(args.out, inputs, features, about)
    print(f"{len(inputs.values)} features of width {model.encoder.backbone.width}: {args.out}")
