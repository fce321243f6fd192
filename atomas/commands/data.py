"""`atomas data`: build, tokenize, index, inspect and fetch corpora; generate the demo corpus."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atomas.errors import AtomasError


def register(subparsers: Any) -> None:
    """Add `atomas data` and its sub-commands to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "data",
        help="pair files into shards; look at them; download; generate",
        description="Build, tokenize, index, inspect, fetch or generate corpora of molecule-text pairs.",
        epilog="Example: atomas data build pairs.tsv --out corpus --fractions train=0.9,validation=0.1",
    )
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    _register_build(commands)
    _register_tokenize(commands)
    _register_verify(commands)
    _register_index(commands)
    _register_leakage(commands)
    _register_inspect(commands)
    _register_fetch(commands)
    _register_demo(commands)


def _register_build(commands: Any) -> None:
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


def _register_tokenize(commands: Any) -> None:
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


def _register_verify(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "verify",
        help="every byte of a corpus against its index; repair",
        description=(
            "Compare every byte of a corpus (and of its tokens) with its index; damaged shards and samples are named. "
            "With --repair, damaged shards go to DIR/quarantine, their good blocks are written again, and the index "
            "counts what is left."
        ),
        epilog="Example:  atomas data verify corpus --repair",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="a built corpus")
    parser.add_argument("--repair", action="store_true", help="quarantine what is damaged, keep the rest")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: every core)")
    parser.set_defaults(run=_verify)


def _register_index(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "index",
        help="read the shards of another project where they lie",
        description=(
            "Write the index of plain WebDataset tars with one sample per key (.smi or .smiles; .txt, .text or "
            ".caption; .json), so that they can be trained on where they lie. Sub-folders are splits; tars in DIR "
            "are `train`. Samples that cannot be used go to DIR/rejected.jsonl."
        ),
        epilog="Example:  atomas data index downloaded/shards && atomas data inspect downloaded/shards",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder with .tar files")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: every core)")
    parser.set_defaults(run=_index)


def _register_leakage(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "leakage",
        help="which rows of evaluation sets are in a corpus",
        description=(
            "Report which rows of evaluation sets are in a training corpus: by molecule, by skeleton (InChIKey's first "
            "block) and by text. `atomas data build --exclude` leaves them out."
        ),
        epilog="Example:  atomas data leakage corpus --against chebi20/test.txt pcdes:test --rows leaks.jsonl",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="a built corpus")
    parser.add_argument(
        "--against",
        nargs="+",
        required=True,
        metavar="SET",
        help="pair files, corpora, or DIR:SPLIT of a corpus",
    )
    parser.add_argument(
        "--split", default="train", metavar="NAME", help="split of the corpus (default train)"
    )
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="write every leaked row to this file (JSON lines)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts to this file")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: every core)")
    parser.set_defaults(run=_leakage)


def _register_inspect(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="counts, lengths, hazards and some records of a corpus",
        description="Read a whole corpus, verify its checksums, and show what is in it.",
        epilog="Example:  atomas data inspect corpus --tokenizer t5 --samples 3",
    )
    parser.add_argument("corpus", metavar="CORPUS", help="its folder, or its http(s):// or s3:// address")
    parser.add_argument(
        "--tokenizer", metavar="SPEC", help="count tokens as well: a tokenizer's folder or hub name"
    )
    parser.add_argument(
        "--samples", type=int, default=3, metavar="N", help="records shown a split (default 3)"
    )
    for name, default, help_text in (
        ("--seed", 0, "run.seed of the order whose shuffling is measured"),
        ("--window-blocks", 64, "its data.window_blocks"),
        ("--group-shards", 64, "its data.group_shards"),
    ):
        parser.add_argument(
            name, type=int, default=default, metavar="N", help=f"{help_text} (default {default})"
        )
    parser.set_defaults(run=_inspect)


def _register_fetch(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "fetch",
        help="download a public data set",
        description="Download the pair files of a public data set: checked, resumable.",
        epilog="Example:  atomas data fetch chebi-20 --out downloads/chebi-20",
    )
    parser.add_argument("dataset", choices=("chebi-20",), help="data set")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--base-url", metavar="URL", help="a mirror: the folder that holds the files")
    parser.set_defaults(run=_fetch)


def _register_demo(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="generate the demo corpus",
        description="Generate a corpus of molecules and descriptions with known fragment-to-phrase links.",
        epilog="Example:  atomas data demo --pairs 10000 --seed 0 --out corpus",
    )
    parser.add_argument("--pairs", type=int, default=10_000, help="molecule-text pairs (default 10000)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same corpus (default 0)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: every core)")
    parser.set_defaults(run=_demo)


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


def _check_workers(args: argparse.Namespace) -> None:
    if args.workers is not None and args.workers < 1:
        raise AtomasError(f"--workers {args.workers}: at least 1 is needed")


def _tokenize(args: argparse.Namespace) -> None:
    _check_workers(args)

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


def _verify(args: argparse.Namespace) -> None:
    _check_workers(args)
    from atomas.data.verify import verify_corpus

    report = verify_corpus(args.directory, repair=args.repair, workers=args.workers)
    for fault in report.faults:
        print(fault)
    if report.lost_records is not None:
        print(
            f"{args.directory}: repaired, {report.lost_records:,} of {report.records:,} records are lost; "
            f"what was damaged is in {args.directory}/quarantine"
        )
    elif report.faults:
        raise AtomasError(
            f"{args.directory} is damaged in {len(report.faults)} places: restore the shards, build the corpus again, "
            "or run it with --repair"
        )
    else:
        print(
            f"{args.directory}: {report.shards:,} shards with {report.records:,} records are as they were written"
        )


def _leakage(args: argparse.Namespace) -> None:
    _check_workers(args)
    from atomas.data.leakage import write_report

    write_report(
        args.directory, args.against, split=args.split, rows=args.rows, counts=args.json, workers=args.workers
    )


def _inspect(args: argparse.Namespace) -> None:
    from atomas.data.inspect import OrderOptions, inspect_corpus

    if args.window_blocks < 1 or args.group_shards < 1:
        raise AtomasError("--window-blocks and --group-shards: at least 1 is needed")
    order = OrderOptions(seed=args.seed, window_blocks=args.window_blocks, group_shards=args.group_shards)
    inspect_corpus(args.corpus, tokenizer=args.tokenizer, samples=args.samples, order=order)


def _index(args: argparse.Namespace) -> None:
    from atomas.data.plain_shards import REJECTED_NAME, index_shards
    from atomas.data.report import make_console, print_index

    _check_workers(args)
    index = index_shards(args.directory, workers=args.workers)
    console = make_console()
    print_index(console, args.directory, index)
    if index["counts"]["rejected"]:
        rejected = f"{index['counts']['rejected']:,} samples cannot be used: {args.directory / REJECTED_NAME}"
        console.print(rejected, markup=False)


def _fetch(args: argparse.Namespace) -> None:
    from atomas.data.fetch import DATASETS, fetch

    fetch(DATASETS[args.dataset], args.out, base_url=args.base_url)


def _demo(args: argparse.Namespace) -> None:
    from atomas.data.demo import build_demo_corpus
    from atomas.data.report import make_console, print_index
    from atomas.data.shards import Corpus

    build_demo_corpus(args.out, pairs=args.pairs, seed=args.seed, workers=args.workers)
    print_index(make_console(), args.out, Corpus.open(args.out).index)


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
