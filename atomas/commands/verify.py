"""`atomas verify`: reproduce golden numbers."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atomas.errors import AtomasError

if TYPE_CHECKING:
    from atomas.verification.golden import Check

FILES = ("clustering.safetensors", "token_interaction.safetensors", "training.safetensors", "t5_config.json")


def register(subparsers: Any) -> None:
    """Add `atomas verify` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "verify",
        help="reproduce golden numbers of the published implementation",
        description=(
            "Run the model on recorded inputs of the published implementation and print, per quantity, the "
            f"largest deviation from its results. DIR holds {', '.join(FILES)}. Exit code 1 above tolerance: "
            "values and losses 1e-4 of a tensor's largest golden magnitude, gradients 1e-3, integers exact."
        ),
        epilog="Example: atomas verify ../shared/golden",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder of golden numbers")
    parser.add_argument("--json", action="store_true", help="print the deviation of every tensor as JSON")
    parser.add_argument(
        "--precision",
        choices=("float32", "float64"),
        default="float64",
        help="float64 (default) shows the rounding of the recording alone; float32 is what training computes",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Verify a folder; exits with 1 if a deviation is above its tolerance."""
    folder: Path = args.directory
    if not folder.is_dir():
        raise AtomasError(f"{folder} is not a folder; give one that holds {', '.join(FILES)}")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise AtomasError(
            f"{folder} lacks {', '.join(missing)}; golden numbers are all of {', '.join(FILES)}"
        )

    import torch

    from atomas.verification.golden import GoldenFile
    from atomas.verification.operators import verify_clustering, verify_token_interaction
    from atomas.verification.training import verify_training

    dtype = getattr(torch, args.precision)
    clustering, interaction, training = (GoldenFile(folder / name, dtype=dtype) for name in FILES[:3])
    checks = [
        *verify_clustering(clustering),
        *verify_token_interaction(interaction),
        *verify_training(training, folder / FILES[3]),
    ]
    (_print_json if args.json else _print_table)(checks)
    if not all(check.passed for check in checks):
        sys.exit(1)


def _print_json(checks: "list[Check]") -> None:
    rows = [
        {
            "quantity": check.quantity,
            "tensor": check.tensor,
            "kind": check.kind,
            "deviation": check.deviation if check.deviation < float("inf") else None,
            "tolerance": check.tolerance,
            "passed": check.passed,
        }
        for check in checks
    ]
    print(json.dumps({"passed": all(check.passed for check in checks), "checks": rows}, indent=1))


def _print_table(checks: "list[Check]") -> None:
    from rich.console import Console
    from rich.table import Table

    from atomas.verification.golden import worst_per_quantity

    table = Table("", "tensors", "largest deviation", "tolerance", "", "in", box=None)
    for check, count in worst_per_quantity(checks):
        integer = check.kind == "integer"
        table.add_row(
            check.quantity,
            str(count),
            f"{check.deviation:.0f} differ" if integer else f"{check.deviation:.1e}",
            "exact" if integer else f"{check.tolerance:.0e}",
            "ok" if check.passed else "TOO FAR",
            check.tensor,
        )
    for column in table.columns[:-1]:
        column.no_wrap = True
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 150)
    console.print(table)
    failed = sum(not check.passed for check in checks)
    console.print(f"{len(checks)} tensors compared, {failed} above tolerance")
