"""`atomas bench`: time the operators and the whole training step, compare two reports, draw what was measured."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from atomas.benchmarks import batch_size, data_build
from atomas.benchmarks.data import command as data_command
from atomas.benchmarks.data import memory as data_memory
from atomas.benchmarks.distributed import command as distributed_command
from atomas.benchmarks.step import command as step_command
from atomas.errors import AtomasError


class _LateParser(argparse.ArgumentParser):
    """Declares its options when they are needed: those of the benchmark are kept by `atomas_kernels`, whose
    import takes seconds.
    """

    declare: Callable[[argparse.ArgumentParser], None] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As every parser does."""
        if self.declare is not None:
            self.declare(self)
            self.declare = None
        return super().parse_known_args(args, namespace)


def register(subparsers: Any) -> None:
    """Add `atomas bench` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="time the operators and the whole step, draw what was measured",
        description="Time the operators and the whole training step beside other implementations, compare two\n"
        "reports, and draw what was measured.",
        epilog="Example:\n  atomas bench kernels --shapes smoke --json kernels.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=_LateParser)
    kernels = kinds.add_parser("kernels", help="time the operators")
    kernels.declare = _declare_kernels
    kernels.set_defaults(run=_kernels)
    step = kinds.add_parser(
        "step",
        help="time the whole training step beside its published form",
        description=step_command.DESCRIPTION,
        epilog=f"Example:\n  atomas bench step {step_command.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    step_command.add_arguments(step)
    step.set_defaults(run=step_command.run)
    sizes = kinds.add_parser(
        "batch-size",
        help="peak memory of a step against the contrastive batch",
        description=batch_size.DESCRIPTION,
        epilog=f"Example:\n  atomas bench batch-size {batch_size.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    batch_size.add_arguments(sizes)
    sizes.set_defaults(run=batch_size.run)
    distributed = kinds.add_parser(
        "distributed",
        help="the alignment over ranks: work, bytes and time of one rank",
        description=distributed_command.DESCRIPTION,
        epilog=f"Example:\n  atomas bench distributed {distributed_command.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    distributed_command.add_arguments(distributed)
    distributed.set_defaults(run=distributed_command.run)
    data = kinds.add_parser(
        "data",
        help="pairs per second of the data stream beside other libraries",
        description=data_command.DESCRIPTION,
        epilog=f"Example:\n  atomas bench data {data_command.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data_command.add_arguments(data)
    data.set_defaults(run=data_command.run)
    held = kinds.add_parser(
        "data-memory",
        help="memory of a loader process over millions of pairs",
        description=data_memory.DESCRIPTION,
        epilog=f"Example:\n  atomas bench data-memory {data_memory.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data_memory.add_arguments(held)
    held.set_defaults(run=data_memory.run)
    build = kinds.add_parser(
        "data-build",
        help="rows per second of atomas data build beside RDKit alone",
        description=data_build.DESCRIPTION,
        epilog=f"Example:\n  atomas bench data-build {data_build.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data_build.add_arguments(build)
    build.set_defaults(run=data_build.run)
    compare = kinds.add_parser(
        "compare",
        help="what became slower or faster between two reports",
        description="Compare the rows of two reports of `atomas bench step` or `atomas bench kernels`. A row is\n"
        "slower or faster only where the middle three fifths of its runs do not overlap.",
        epilog="Example:\n  atomas bench compare old.json docs/results/step/cpu-small.json --fail-slower 10",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.add_argument("before", metavar="A.json", help="the earlier report")
    compare.add_argument("after", metavar="B.json", help="the later report")
    compare.add_argument(
        "--fail-slower",
        type=float,
        metavar="PERCENT",
        help="exit code 1 where a row is slower beyond noise by more than this, or cannot be timed any more",
    )
    compare.set_defaults(run=_compare)
    render = kinds.add_parser(
        "render",
        help="pictures and tables of reports",
        description="Draw times and memory of reports of `atomas bench kernels` and `atomas bench step` as PNG,\n"
        "and write their tables as Markdown.",
        epilog="Example:\n  atomas bench render docs/results/kernels_cpu_float32.json --out docs/images",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    render.add_argument("files", nargs="+", metavar="FILE", help="reports (JSON)")
    render.add_argument("--out", required=True, metavar="DIR", help="folder for the pictures and tables")
    render.set_defaults(run=_render)


def _declare_kernels(parser: argparse.ArgumentParser) -> None:
    from atomas_kernels.bench import command

    command.add_arguments(parser)
    parser.description = command.DESCRIPTION
    parser.epilog = f"Example: atomas bench kernels {command.EXAMPLE}"


def _kernels(args: argparse.Namespace) -> None:
    from atomas_kernels.bench import command

    try:
        code = command.run(args)
    except ValueError as error:
        raise AtomasError(str(error)) from error
    if code:
        sys.exit(code)


def _compare(args: argparse.Namespace) -> None:
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from atomas.benchmarks.compare import compare, different_places, read

    before, after = read(Path(args.before)), read(Path(args.after))
    console = Console()
    for difference in different_places(before, after):
        console.print(f"not the same machine or software: {difference}")
    table = Table()
    for column in ("measured", "before, s", "after, s", "ratio", "verdict", "peak, MiB"):
        table.add_column(column, justify="left" if column in ("measured", "verdict") else "right")
    rows = list(compare(before, after))
    for row in rows:
        times = ["-" if each is None else f"{each.middle:.4g}" for each in (row.before, row.after)]
        peaks = [
            f"{each.peak_mb:.0f}" if each and each.peak_mb is not None else "-"
            for each in (row.before, row.after)
        ]
        style = {"slower": "red", "lost": "red", "faster": "green", "gained": "green"}.get(row.verdict)
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        table.add_row(row.what, *times, ratio, row.verdict, " -> ".join(peaks), style=style)
    console.print(table)
    if args.fail_slower is not None and any(row.slower_than(args.fail_slower) for row in rows):
        sys.exit(1)


def _render(args: argparse.Namespace) -> None:
    from pathlib import Path

    from atomas.viz.data_benchmark import render_data_report, render_memory_report
    from atomas.viz.kernel_benchmarks import read_report, render_report
    from atomas.viz.step_benchmark import render_step_report

    reports = {name: read_report(Path(name)) for name in args.files}
    for name, report in reports.items():
        draw = {
            "step": render_step_report,
            "data": render_data_report,
            "data-memory": render_memory_report,
        }.get(report.get("benchmark", ""), render_report)
        for path in draw(report, Path(args.out), Path(name).stem):
            print(path)
