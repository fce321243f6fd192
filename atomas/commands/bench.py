"""`atomas bench`: time the operators, and draw what was measured."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

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
        help="time the operators, draw what was measured",
        description="Time the operators beside other implementations, and draw what was measured.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=_LateParser)
    kernels = kinds.add_parser("kernels", help="time the operators")
    kernels.declare = _declare_kernels
    kernels.set_defaults(run=_kernels)
    render = kinds.add_parser(
        "render",
        help="pictures and tables of reports",
        description="Draw times and memory of reports of `atomas bench kernels` as PNG, and write their tables as\n"
        "Markdown.",
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


def _render(args: argparse.Namespace) -> None:
    from pathlib import Path

    from atomas.viz.kernel_benchmarks import read_report, render_report

    reports = {name: read_report(Path(name)) for name in args.files}
    for name, report in reports.items():
        for path in render_report(report, Path(args.out), Path(name).stem):
            print(path)
