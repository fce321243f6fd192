"""`atomas visualize`: pictures of what a checkpoint has aligned."""

import argparse
from typing import Any

from atomas.errors import AtomasError


def register(subparsers: Any) -> None:
    """Add `atomas visualize` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "visualize",
        help="draw the clusters of a molecule and its text, and which match",
        description="Draw, level by level, the clusters of a molecule on its atoms and those of the text on its\n"
        "words, with matching parts in one colour under one number: DIR/*.png, DIR/*.svg and DIR/index.html,\n"
        "which shows all pairs and needs no other file.",
        epilog="Examples:\n"
        '  atomas visualize --checkpoint runs/mine --smiles "CC(=O)Oc1ccccc1C(=O)O" \\\n'
        '      --text "A benzoic acid with an acetoxy group." --out pictures\n'
        "  atomas visualize --checkpoint runs/mine --data corpus --split test --rows 3 17 42 --out pictures",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a checkpoint, or a run folder for its newest one"
    )
    parser.add_argument("--best", action="store_true", help="of a run folder take the best checkpoint")
    parser.add_argument("--momentum", action="store_true", help="use the momentum copy of the encoder")
    parser.add_argument("--smiles", metavar="S", help="a molecule; with --text")
    parser.add_argument("--text", metavar="T", help="its description")
    parser.add_argument("--data", metavar="DIR", help="a corpus; with --rows")
    parser.add_argument("--split", default="test", help="split of the corpus (default: test)")
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        metavar="N",
        help="rows of the split, counted from 0 (default: the first)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    given = args.smiles is not None and args.text is not None
    if given == (args.data is not None) or (args.smiles is None) != (args.text is None):
        raise AtomasError("say what to draw: either --smiles S --text T, or --data DIR --rows N ...")
    if given and args.rows is not None:
        raise AtomasError("--rows are of a corpus: leave them out beside --smiles and --text")

    from pathlib import Path

    from atomas.tasks.visualization import corpus_pairs, given_pair, visualize

    if given:
        pairs = [given_pair(args.smiles, args.text)]
    else:
        pairs = corpus_pairs(args.data, args.split, args.rows or [0])
    page = visualize(Path(args.checkpoint), pairs, Path(args.out), best=args.best, momentum=args.momentum)
    print(f"pictures: {page}")
