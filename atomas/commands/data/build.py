"""`atomas data build`: pair files into a corpus."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atomas.errors import AtomasError


def register(commands: Any) -> None:
    """Add `atomas data build` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "build",
        help="pair files -> shards",
        description=(
            "Turn pair files (TSV, CSV, JSONL, Parquet; .gz; ARCHIVE.zip:MEMBER) into a corpus of shards. "
            "Every molecule is validated with RDKit; rejected rows go to DIR/rejected.jsonl with the reason."
        ),
        epilog="Examples:  atomas data build pairs.tsv --out corpus --fractions train=0.9,validation=0.1  |  "
        "atomas data build --split train=train.txt validation=validation.txt --out corpus --exclude other  |  "
        "atomas data build pairs.parquet --out corpus --slurm cpu --workers 200 --slurm-option account=abc",
    )
    parser.add_argument(
        "inputs", nargs="*", metavar="INPUT", help="pair file (split `train`, or --fractions)"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--split", nargs="+", action="extend", metavar="NAME=FILE", help="pair file of a named split"
    )
    parser.add_argument(
        "--fractions", nargs="+", metavar="NAME=SHARE", help="split at random, e.g. train=0.9,validation=0.1"
    )
    parser.add_argument(
        "--by",
        choices=("random", "scaffold"),
        default="random",
        help="with --fractions: keep the rows of a molecule (random) or of a Bemis-Murcko scaffold together",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random order (default 0)")
    parser.add_argument(
        "--exclude",
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR|FILE",
        help="leave out the molecules of this corpus or pair file (compared by InChIKey)",
    )
    parser.add_argument(
        "--exclude-by",
        choices=("molecule", "skeleton"),
        default="molecule",
        help="whole InChIKey, or only its first block (leaves out stereoisomers as well)",
    )
    parser.add_argument("--smiles-column", metavar="NAME", help="default: smiles, isosmiles, ...")
    parser.add_argument("--text-column", metavar="NAME", help="default: description, text, caption, summary")
    parser.add_argument("--id-column", metavar="NAME", help="default: cid, id, or else the line number")
    parser.add_argument(
        "--columns", metavar="A,B,...", help="the column names of files that have no header line"
    )
    parser.add_argument(
        "--identity",
        choices=("inchikey", "smiles"),
        default="inchikey",
        help="what tells that two molecules are the same: InChIKey, or canonical SMILES (faster; no skeletons)",
    )
    parser.add_argument(
        "--deduplicate",
        nargs="+",
        choices=("molecule", "text", "pair"),
        default=[],
        help="keep only the first record of a split with the same molecule, text, or both (default: keep all)",
    )
    parser.add_argument(
        "--weight", nargs="+", action="extend", default=[], metavar="FILE=W",
        help="weight of a pair file when sources are mixed, written to the index (default 1)",
    )  # fmt: skip
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes (default: every core); with --slurm: jobs at a time",
    )
    parser.add_argument("--slurm", metavar="PARTITION", help="do the work in Slurm arrays of this partition")
    parser.add_argument(
        "--slurm-option", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="option for sbatch, e.g. account=abc time=02:00:00 (default 04:00:00 for a task)",
    )  # fmt: skip
    parser.add_argument(
        "--memory", type=float, default=2.0, metavar="GIB",
        help="what duplicates and splits are worked out in; more goes to disk (default 2)",
    )  # fmt: skip
    parser.add_argument(
        "--compression", choices=("none", "zstd"), default="none",
        help="of the blocks in the shards: zstd takes a quarter of the room (default none)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="delete DIR first if it is not a corpus")
    parser.set_defaults(run=_build)


def _build(args: argparse.Namespace) -> None:
    files = _files_by_split(args.inputs, args.split)
    fractions = _parse_fractions(args.fractions) if args.fractions else None
    if fractions and args.split:
        raise AtomasError(
            "--split and --fractions exclude each other: give the files as INPUT with --fractions"
        )

    from atomas.data.build import BuildOptions, build_corpus
    from atomas.data.building.engine import Engine, Local, Slurm
    from atomas.data.report import make_console, print_index
    from atomas.data.sources import Columns

    engine: Engine = Local(workers=args.workers)
    if args.slurm:
        slurm_options = dict(_parse_pair(pair, "--slurm-option", "account=abc") for pair in args.slurm_option)
        engine = Slurm(partition=args.slurm, workers=args.workers, options=slurm_options)
    elif args.slurm_option:
        raise AtomasError("--slurm-option without --slurm PARTITION")
    options = BuildOptions(
        columns=Columns(
            smiles=args.smiles_column,
            text=args.text_column,
            id=args.id_column,
            header=tuple(args.columns.split(",")) if args.columns else None,
        ),
        fractions=fractions,
        by=args.by,
        seed=args.seed,
        exclude=args.exclude,
        exclude_by=args.exclude_by,
        identity=args.identity,
        deduplicate=args.deduplicate,
        weights=_parse_weights(args.weight),
        compression=args.compression,
        engine=engine,
        memory_mb=round(args.memory * 1024),
        overwrite=args.overwrite,
    )
    index = build_corpus(files, args.out, options)
    print_index(make_console(), args.out, index)


def _files_by_split(inputs: Sequence[str], splits: Sequence[str] | None) -> dict[str, list[str]]:
    if inputs and splits:
        raise AtomasError(f"{inputs[0]} has no split: write --split NAME={inputs[0]} like the others")
    files: dict[str, list[str]] = {}
    for pair in splits or [f"train={source}" for source in inputs]:
        name, source = _parse_pair(pair, "--split", "train=FILE")
        files.setdefault(name, []).append(source)
    return files


def _parse_fractions(words: Sequence[str]) -> dict[str, float]:
    fractions: dict[str, float] = {}
    for pair in ",".join(words).split(","):
        name, share = _parse_pair(pair, "--fractions", "train=0.9,validation=0.1")
        if name in fractions:
            raise AtomasError(f"--fractions names {name!r} twice")
        try:
            fractions[name] = float(share)
        except ValueError:
            raise AtomasError(f"--fractions {pair}: {share!r} is not a number") from None
    return fractions


def _parse_weights(pairs: Sequence[str]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for pair in pairs:
        source, _, weight = pair.rpartition("=")
        try:
            weights[source] = float(weight)
        except ValueError:
            raise AtomasError(f"--weight {pair}: write FILE=W as in pairs.tsv=0.5") from None
    return weights


def _parse_pair(pair: str, option: str, example: str) -> tuple[str, str]:
    name, separator, value = pair.partition("=")
    if not (separator and value and name.replace("_", "").replace("-", "").isalnum()):
        raise AtomasError(
            f"{option} {pair!r}: write NAME=VALUE as in {example}; a name has letters, digits, - and _"
        )
    return name, value
