"""`atomas import-checkpoint`: weights from elsewhere as a checkpoint of this framework."""

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    """Add `atomas import-checkpoint` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "import-checkpoint",
        help="make a checkpoint of a file of the authors, or of an export",
        description="Make a checkpoint of a file of the authors' implementation (a PyTorch-Lightning .ckpt, or its\n"
        "state_dict as .pt or .safetensors), or of a directory that `atomas export` wrote. Only tensors are read, no\n"
        "code in the file is run. Every group of tensors that is missing or unexpected gets a line.",
        epilog="Examples:\n  atomas import-checkpoint released.ckpt --tokenizer laituan245/molt5-base --out imported\n"
        "  atomas import-checkpoint exported --out again",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="checkpoint of the authors, or directory of an export")
    parser.add_argument("--out", required=True, metavar="DIR", help="checkpoint to write")
    parser.add_argument(
        "--tokenizer",
        metavar="SPEC",
        help="the T5 tokenizer that a file of the authors does not hold: a folder or a hub name",
    )
    parser.add_argument(
        "--task",
        choices=("genmol", "gentext"),
        default="genmol",
        help="what a model of the authors writes, molecules or texts (default: genmol)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from atomas.errors import AtomasError

    file, out = Path(args.file), Path(args.out)
    if not file.exists():
        raise AtomasError(
            f"{file} does not exist; give a checkpoint of the authors, or a folder of `atomas export`"
        )
    if file.is_dir():
        from atomas.training.export import import_export

        import_export(file, out)
    elif args.tokenizer is None:
        raise AtomasError(f"{file} holds no tokenizer: name the one it was trained with, --tokenizer SPEC")
    else:
        from atomas.training.authors_checkpoint import import_authors

        for line in import_authors(file, out, tokenizer=args.tokenizer, task=args.task):
            print(line)
    print(f"checkpoint: {out}")
