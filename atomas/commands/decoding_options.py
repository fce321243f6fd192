"""Options of the commands that write with a model: which checkpoint, and how outputs are searched for."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atomas.tasks.decoding import DecodingSettings


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """`--checkpoint`, `--best`, `--momentum`, `--device`, `--batch-size`."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a checkpoint, or a run folder for its newest one"
    )
    parser.add_argument("--best", action="store_true", help="of a run folder take the best checkpoint")
    parser.add_argument(
        "--momentum", action="store_true", help="use the momentum copy, as the published evaluation does"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="inputs in one pass (default: 32)"
    )


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    """The fields of `DecodingSettings`."""
    group = parser.add_argument_group("decoding")
    group.add_argument(
        "--beams", type=int, default=5, metavar="N", help="beam search width; 1: greedy (default: 5)"
    )
    group.add_argument(
        "--max-tokens", type=int, default=512, metavar="N", help="longest output in tokens (default: 512)"
    )
    group.add_argument(
        "--length-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1 favours long outputs (default: 1)",
    )
    group.add_argument("--sample", action="store_true", help="draw tokens at random instead of searching")
    group.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help="of the sampling (default: 1)"
    )
    group.add_argument(
        "--top-k", type=int, default=0, metavar="N", help="sample among the N likeliest tokens; 0: all"
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="X",
        help="sample among the likeliest tokens of this total",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default: 0)")


def decoding_settings(args: argparse.Namespace, *, num_return_sequences: int = 1) -> "DecodingSettings":
    """What the options say. Raises AtomasError where they make no sense."""
    from atomas.tasks.decoding import DecodingSettings

    return DecodingSettings(
        beams=args.beams,
        max_tokens=args.max_tokens,
        length_penalty=args.length_penalty,
        num_return_sequences=num_return_sequences,
        sample=args.sample,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
