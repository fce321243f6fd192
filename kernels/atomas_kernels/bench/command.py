"""The benchmark command, shared by `atomas bench kernels` and `python -m atomas_kernels.bench`."""

import argparse
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from atomas_kernels.bench.operators import Case, Operator

OPERATORS = {
    "token_interaction": "interaction",
    "clustering": "clustering",
    "contrastive_cross_entropy": "contrastive",
    "lm_cross_entropy": "language_model",
    "momentum_update": "momentum",
    "attention": "attention",
}
"""Module of each benchmark, imported when it is run."""

SUITES = ("smoke", "paper", "scale")
DESCRIPTION = (
    "Time the operators beside the published form, plain PyTorch, torch.compile and other packages. What a "
    "provider computes is compared with float64 before it is timed; one that is wrong, does not fit or cannot run "
    "is a row that says so. Exit code 1 where one of our own backends was wrong."
)
EXAMPLE = "--op token_interaction --batch 8 32 --json result.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add(
        "--op",
        nargs="+",
        choices=OPERATORS,
        default=list(OPERATORS),
        metavar="OP",
        help=f"of {', '.join(OPERATORS)} (default: all)",
    )
    add(
        "--shapes",
        choices=SUITES,
        default="smoke",
        help="smoke: seconds (default); paper: the sizes of training; scale: memory over the batch, until it runs out",
    )
    add("--providers", nargs="+", metavar="NAME", help="of those that the operators have (default: all)")
    add(
        "--dtype",
        nargs="+",
        choices=("float32", "bfloat16", "float16"),
        default=["float32"],
        metavar="DTYPE",
        help="float32 (default), bfloat16, float16",
    )
    add("--batch", nargs="+", type=_positive, metavar="B", help="pairs, instead of the suite's")
    add("--width", nargs="+", type=_positive, metavar="D", help="token widths, instead of the suite's")
    add(
        "--mode",
        nargs="+",
        choices=("fwd", "bwd", "full"),
        default=["fwd", "full"],
        metavar="MODE",
        help="fwd: without a graph; full: forward and backward; bwd: the backward part of full (default: fwd full)",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--threads", type=_positive, default=1, metavar="N", help="CPU threads (default: 1)")
    add("--repeats", type=_positive, default=7, metavar="N", help="timed runs of each provider (default: 7)")
    add(
        "--seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="stop repeating a provider after this time (default: 10)",
    )
    add(
        "--memory-limit",
        type=float,
        metavar="GIB",
        help="what a provider may allocate on the CPU (default: three quarters of what is free)",
    )
    add("--seed", type=int, default=0, help="of lengths and values (default: 0)")
    add("--json", type=Path, metavar="FILE", help="written after every row; standard output without it")
    add("--resume", action="store_true", help="keep the rows that FILE has and measure the others")


def run(options: argparse.Namespace) -> int:
    """Run the benchmarks that the options ask for; returns the exit code. A user's mistake is a ValueError."""
    import importlib

    import torch

    from atomas_kernels.bench import memory, report
    from atomas_kernels.bench.harness import WRONG, Plan, measure, modes_of

    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: torch sees no CUDA GPU; take --device cpu")
    if options.resume and options.json is None:
        raise ValueError("--resume: needs --json FILE")
    operators: dict[str, Operator] = {
        op: importlib.import_module(f"atomas_kernels.bench.{OPERATORS[op]}").OPERATOR for op in options.op
    }
    chosen = {op: _providers(operator, options.providers) for op, operator in operators.items()}
    unknown = set(options.providers or ()) - {name for names in chosen.values() for name in names}
    if unknown:
        known = sorted({name for operator in operators.values() for name in operator.providers})
        raise ValueError(f"--providers: no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    plan = Plan(
        modes=tuple(options.mode),
        repeats=options.repeats,
        seconds=options.seconds,
        memory_limit=int(options.memory_limit * memory.GIB)
        if options.memory_limit
        else memory.available(device),
    )
    packages = {
        p.package for operator in operators.values() for p in operator.providers.values() if p.package
    }
    head = report.head(device, packages)
    result = report.Report.resume(options.json, head) if options.resume else report.Report(options.json, head)
    work = [(op, case) for op in operators for case in _cases(operators[op], options, device)]
    wrong = False
    with _threads(options.threads), _Progress(len(work)) as progress:
        for op, case in work:
            key = {"op": op, "shape": dict(case.shape), "dtype": str(case.dtype).removeprefix("torch.")}
            modes = modes_of(operators[op], plan.modes)
            missing = [
                name
                for name in chosen[op]
                if not all(result.has(provider=name, mode=mode, **key) for mode in modes)
            ]
            progress.show(f"{op} {key['dtype']} {_shape(case)}")
            for row in measure(operators[op], missing, case, plan):
                result.add({"op": op, **row})
                wrong |= row["backend"] is not None and str(row["reason"]).startswith(WRONG)
                progress.row(result.content["rows"][-1])
            progress.done += 1
    if options.json is None:
        print(result.text(), end="")
    else:
        print(f"wrote {options.json}: {len(result.content['rows'])} rows", file=sys.stderr)
    return int(wrong)


def _providers(operator: "Operator", names: list[str] | None) -> list[str]:
    return [name for name in operator.providers if names is None or name in names]


def _cases(operator: "Operator", options: argparse.Namespace, device: "torch.device") -> "Iterator[Case]":
    """The suite's shapes with the batch sizes and widths that were asked for."""
    import torch

    from atomas_kernels.bench.operators import Case

    shapes = []
    for shape in operator.shapes[options.shapes]:
        batches = options.batch if options.batch and "batch" in shape else [shape.get("batch")]
        widths = options.width if options.width and "width" in shape else [shape.get("width")]
        for batch in batches:
            for width in widths:
                sizes = {**shape, "batch": batch, "width": width}
                wanted = {name: size for name, size in sizes.items() if size is not None}
                if wanted not in shapes:
                    shapes.append(wanted)
    for dtype in options.dtype:
        for shape in shapes:
            yield Case.draw(shape, dtype=getattr(torch, dtype), device=device, seed=options.seed)


def _shape(case: "Case") -> str:
    return " ".join(f"{name}={size}" for name, size in case.shape.items())


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Progress:
    """A bar on a terminal, a line per case and row elsewhere; on standard error."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._terminal = sys.stderr.isatty()
        self._start = time.monotonic()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def show(self, text: str) -> None:
        """The case that is measured now."""
        if not self._terminal:
            print(f"[{self.done + 1}/{self.total}] {text}", file=sys.stderr, flush=True)
            return
        filled = 24 * self.done // max(self.total, 1)
        bar, seconds = "█" * filled + "·" * (24 - filled), time.monotonic() - self._start
        line = f"{bar} {self.done}/{self.total} {seconds:.0f} s  {text}"
        print(
            "\r\033[K" + line[: shutil.get_terminal_size().columns - 1], end="", file=sys.stderr, flush=True
        )

    def row(self, row: dict[str, object]) -> None:
        """What became known of one provider."""
        if not self._terminal:
            times = row["ms"]
            known = (
                f"{times['p50']:.2f} ms" if isinstance(times, dict) else f"{row['status']}: {row['reason']}"
            )
            print(f"    {row['provider']} {row['mode']}: {known}", file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
