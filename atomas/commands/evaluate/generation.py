"""`atomas evaluate captioning` and `atomas evaluate generation`: outputs for a whole split, scored."""

import argparse
from pathlib import Path
from typing import Any

from atomas.commands.checks import at_least_one, can_be_written, is_seed
from atomas.commands.decoding_options import add_checkpoint_options, add_decoding_options, decoding_settings
from atomas.errors import AtomasError

ABOUT = {
    "captioning": ("write captions for the molecules of a split", "captions for the molecules"),
    "generation": ("write molecules for the texts of a split", "molecules for the texts"),
}


def register(tasks: Any) -> None:
    """Add `captioning` and `generation` to the tasks of `atomas evaluate`."""
    for task, (short, written) in ABOUT.items():
        parser: argparse.ArgumentParser = tasks.add_parser(
            task,
            help=short,
            description=f"Write {written} of a split and score them like `atomas evaluate predictions`.\n"
            "The predictions are kept next to the report. Finished rows are kept as they come: the same\n"
            "command continues after a cut. Several ranks share the rows.",
            epilog=f"Examples:\n  atomas evaluate {task} --checkpoint runs/demo/hierarchical --data runs/demo/corpus "
            f"--split test --report {task}.json\n"
            f"  torchrun --standalone --nproc-per-node 8 -m atomas evaluate {task} --checkpoint runs/large --best \\\n"
            f"      --momentum --shard-weights --data corpus --report {task}.json",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_checkpoint_options(parser)
        parser.add_argument("--data", required=True, metavar="DIR", help="a corpus built by `atomas data`")
        parser.add_argument("--split", default="test", help="split of the corpus (default: test)")
        parser.add_argument("--max-rows", type=int, metavar="N", help="the first N rows only")
        parser.add_argument("--report", required=True, type=Path, metavar="FILE", help="a .json file")
        parser.add_argument(
            "--shard-weights",
            action="store_true",
            help="spread the weights over the ranks (ZeRO stage 3), for a model that one device does not hold",
        )
        add_decoding_options(parser)
        scoring = parser.add_argument_group("scoring")
        if task == "captioning":
            scoring.add_argument(
                "--tokenizer", metavar="DIR", help="of caption BLEU: as for `atomas evaluate predictions`"
            )
        scoring.add_argument(
            "--resamples", type=int, default=1000, metavar="N", help="of the bootstrap (default: 1000)"
        )
        parser.set_defaults(run=run, tokenizer=None)


def run(args: argparse.Namespace) -> None:
    """Write, score, print the table, leave report and predictions."""
    if args.report.suffix != ".json":
        raise AtomasError(f"--report {args.report}: the ending must be .json")
    at_least_one(args, "batch_size", "max_rows", "resamples")
    is_seed(args)
    can_be_written("--report", args.report)

    from atomas.metrics.resampling import Bootstrap
    from atomas.tasks.generation_report import GenerationRun, generation_report

    generation_report(
        GenerationRun(
            task=args.task,
            checkpoint=Path(args.checkpoint),
            best=args.best,
            momentum=args.momentum,
            data=args.data,
            split=args.split,
            max_rows=args.max_rows,
            report=args.report,
            batch_size=args.batch_size,
            device=args.device,
            shard_weights=args.shard_weights,
            decoding=decoding_settings(args),
            tokenizer=args.tokenizer,
            bootstrap=Bootstrap(resamples=args.resamples, seed=args.seed),
        )
    )
