"""`atomas data tokenize`: tokens beside the shards."""

import argparse
from pathlib import Path
from typing import Any

from atomas.commands.checks import at_least_one


def register(commands: Any) -> None:
    """Add `atomas data tokenize` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "tokenize",
        help="tokenize a corpus once, for all runs with the same tokenizer",
        description=(
            "Write the tokens of a corpus beside its shards, as DIR/tokens-FINGERPRINT. Training with this tokenizer "
            "then reads arrays in place of texts, and knows all lengths at once. What is there already is left; "
            "a run that was cut off goes on with the shard it was at."
        ),
        epilog="Examples:  atomas data tokenize corpus --tokenizer t5  |  "
        "atomas data tokenize corpus --tokenizer corpus --vocab-size 2048",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="a built corpus")
    parser.add_argument(
        "--tokenizer", required=True, metavar="SPEC",
        help="tokenizer.source of the runs: a tokenizer's folder, a hub name, or `corpus` to train one as they do",
    )  # fmt: skip
    parser.add_argument(
        "--vocab-size", type=int, default=2048, metavar="N",
        help="tokenizer.vocab_size of the runs, with `corpus` (default 2048)",
    )  # fmt: skip
    parser.add_argument(
        "--train-split", default="train", metavar="NAME",
        help="data.train_split of the runs, with `corpus` (default train)",
    )  # fmt: skip
    parser.add_argument(
        "--compression", choices=("none", "zstd"), default="none",
        help="of the blocks: zstd takes about a third of the room, and more time to read (default none)",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: every core, up to 16)")
    parser.set_defaults(run=_tokenize)


def _tokenize(args: argparse.Namespace) -> None:
    at_least_one(args, "workers")

    import tempfile

    from atomas.config import TokenizerConfig
    from atomas.data.shards import Corpus
    from atomas.data.tokenizer import resolve_tokenizer
    from atomas.data.tokens import tokenize_corpus

    with tempfile.TemporaryDirectory() as cache:
        tokenizer = resolve_tokenizer(
            TokenizerConfig(source=args.tokenizer, vocab_size=args.vocab_size),
            Corpus.open(args.directory),
            Path(cache),
            split=args.train_split,
        )
    folder = tokenize_corpus(args.directory, tokenizer, compression=args.compression, workers=args.workers)
    print(f"tokens: {folder}  (fingerprint {tokenizer.fingerprint[:16]}, {tokenizer.vocab_size:,} pieces)")
