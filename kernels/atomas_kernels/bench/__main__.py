"""Command line: `python -m atomas_kernels.bench --op token_interaction --json result.json`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from atomas_kernels.bench import clustering, interaction
from atomas_kernels.bench.harness import Case, environment, measure
from atomas_kernels.bench.lengths import LENGTHS, draw

_OPERATORS = {"token_interaction": interaction, "clustering": clustering}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks that the arguments ask for; returns the exit code."""
    options = _parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rows = []
    for op in options.op:
        module = _OPERATORS[op]
        for batch in options.batch:
            case = Case(
                text_lengths=draw("text", batch, options.seed),
                smiles_lengths=draw("smiles", batch, options.seed),
                width=options.width,
                dtype=_DTYPES[options.dtype],
                seed=options.seed,
            )
            for provider in options.providers or list(module.PROVIDERS):
                row = measure(module, provider, case, repeats=options.repeats)
                rows.append({"op": op, **row, "threads": torch.get_num_threads()})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    report = {**environment(), "length_distribution": LENGTHS, "rows": rows}
    text = json.dumps(report, indent=1)
    if options.json is None:
        print(text)
    else:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")
        print(f"wrote {options.json}", file=sys.stderr)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m atomas_kernels.bench",
        description="Time the operators on the CPU; results are checked against float64 first.",
        epilog="example: OMP_NUM_THREADS=1 python -m atomas_kernels.bench --op clustering --batch 8 --json out.json",
    )
    parser.add_argument("--op", nargs="+", choices=_OPERATORS, default=list(_OPERATORS))
    parser.add_argument(
        "--providers", nargs="+", choices=sorted({*interaction.PROVIDERS, *clustering.PROVIDERS})
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[8, 32], help="pairs (default: 8 32)")
    parser.add_argument("--width", type=int, default=768, help="token width D (default: 768)")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads (default: what torch takes)")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each form (default: 7)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write; standard output without it")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
