"""`atomas plan`: memory, communication and time of a run on a cluster, before there is one."""

import argparse
from typing import Any

_GPU_NAMES = ("a100-80", "h100", "h200", "b200")


def register(subparsers: Any) -> None:
    """Add `atomas plan` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "plan",
        help="memory and time of a run on a cluster, on paper",
        description="Memory per GPU by component for every ZeRO stage, time of computation and communication for both\n"
        "ways to exchange tokens, pairs per second, and the largest number of pairs per GPU that fits.\n"
        "Every key of the configuration is an option: --section.field value.",
        epilog="Examples:\n"
        "  atomas plan --nodes 64 --gpus-per-node 8 --gpu h200 --link-gbps 400 --config FILE\n"
        "  atomas plan --nodes 2 --gpus-per-node 8 --gpu h100 --pairs-per-gpu 128 --training.precision bf16 \\\n"
        "      --plot plan.png --json plan.json\n"
        "  atomas plan --config FILE --corpus DIR --assume matmul_fraction=0.5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file; without it, the defaults")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default: 1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--gpu", choices=_GPU_NAMES, default="h200", help="default: h200")
    parser.add_argument(
        "--link-gbps", type=float, default=400.0, metavar="GBPS",
        help="Gbit/s of one GPU's port to the network between nodes, one direction (default: 400)",
    )  # fmt: skip
    parser.add_argument(
        "--pairs-per-gpu", type=int, metavar="B",
        help="default: data.batch_size over the GPUs, where they divide it; 64 otherwise",
    )  # fmt: skip
    parser.add_argument(
        "--mean-text-tokens", type=float, metavar="N", help="default: 110, as in ChEBI-20 with T5's tokens"
    )
    parser.add_argument(
        "--mean-smiles-tokens", type=float, metavar="N", help="default: 73, as in ChEBI-20 with T5's tokens"
    )
    parser.add_argument(
        "--corpus",
        metavar="DIR",
        help="measure the lengths of a corpus with the configuration's tokenizer instead",
    )
    parser.add_argument(
        "--vocabulary", type=int, metavar="V",
        help="pieces of the tokenizer; default: tokenizer.vocab_size, or what tokenizer.source holds",
    )  # fmt: skip
    parser.add_argument(
        "--assume", action="append", default=[], metavar="KEY=VALUE",
        help="replace an assumption, such as matmul_fraction=0.5; all are printed below the tables",
    )  # fmt: skip
    parser.add_argument("--plot", metavar="FILE", help="draw 1 to 1,024 GPUs (PNG, SVG or PDF)")
    parser.add_argument("--json", metavar="FILE", help="write everything that is printed, and the curves")
    parser.set_defaults(run=_run, overrides=True)


def _run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from atomas.config_file import load_config
    from atomas.json_files import write_json
    from atomas.planning.hardware import GPUS, Cluster
    from atomas.planning.report import plan_report
    from atomas.planning.sizes import T5Sizes
    from atomas.planning.workload import Workload

    config = load_config(args.config, args.overrides)
    _check(args)
    cluster = Cluster(
        gpu=GPUS[args.gpu],
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        link_bytes_per_second=args.link_gbps * 1e9 / 8,
    )
    vocabulary = args.vocabulary or _vocabulary(config)
    work = Workload(
        config,
        T5Sizes.of_model(config.model, vocabulary),
        _lengths(args, config),
        _pairs(args, config, cluster.ranks),
        cluster.ranks,
    )
    report, text = plan_report(work, cluster, _assumptions(args.assume), gpu_name=args.gpu)
    print(text)
    if args.json:
        write_json(Path(args.json), report)
    if args.plot:
        from atomas.viz.plan import plot_plan

        plot_plan(report, Path(args.plot))


def _check(args: argparse.Namespace) -> None:
    from atomas.errors import AtomasError

    numbers = (
        "nodes",
        "gpus_per_node",
        "link_gbps",
        "pairs_per_gpu",
        "mean_text_tokens",
        "mean_smiles_tokens",
    )
    for name in numbers:
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise AtomasError(f"--{name.replace('_', '-')} {value:g}: must be greater than 0")
    if args.corpus and (args.mean_text_tokens or args.mean_smiles_tokens):
        raise AtomasError(
            "--corpus measures the lengths: leave out --mean-text-tokens and --mean-smiles-tokens"
        )


def _pairs(args: argparse.Namespace, config: Any, ranks: int) -> int:
    batch: int = config.data.batch_size
    if args.pairs_per_gpu:
        return int(args.pairs_per_gpu)
    if batch % ranks == 0:
        return batch // ranks
    print(
        f"data.batch_size = {batch} cannot be shared by {ranks} GPUs: planned with 64 pairs on each (--pairs-per-gpu)"
    )
    return 64


def _lengths(args: argparse.Namespace, config: Any) -> Any:
    from atomas.planning.workload import CHEBI20_MEAN, PairLengths

    if args.corpus:
        from atomas.planning.corpus import measured_lengths

        return measured_lengths(args.corpus, config)
    return PairLengths.spread(
        args.mean_text_tokens or CHEBI20_MEAN["text"], args.mean_smiles_tokens or CHEBI20_MEAN["smiles"]
    )


def _vocabulary(config: Any) -> int:
    """Pieces of the tokenizer, read without building it where it can be."""
    import json
    from pathlib import Path

    from atomas.errors import AtomasError

    source = config.tokenizer.source
    if source == "corpus":
        return int(config.tokenizer.vocab_size)
    file = Path(source) / "tokenizer.json"
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        added = {token["id"] for token in content.get("added_tokens", [])}
        return max(len(content["model"]["vocab"]), 1 + max(added, default=0))
    raise AtomasError(
        f"tokenizer.source = {source!r} has no tokenizer.json to count: give the number of pieces as --vocabulary"
    )


def _assumptions(given: list[str]) -> Any:
    from dataclasses import fields, replace

    from atomas.errors import AtomasError
    from atomas.planning.hardware import Assumptions

    assumed, names = Assumptions(), [field.name for field in fields(Assumptions)]
    for item in given:
        key, _, value = item.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if key not in names or number < 0:
            raise AtomasError(f"--assume {item!r}: give KEY=NUMBER with one of {', '.join(names)}")
        assumed = replace(assumed, **{key: number})
    return assumed
