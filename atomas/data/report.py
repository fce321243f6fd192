"""What an index says, as tables and warnings for a terminal or a log."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from atomas.data.hazards import HAZARDS

PIPE_WIDTH = 120


def make_console() -> Console:
    """A console on stdout as wide as the terminal, 120 characters in a pipe."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


def print_index(console: Console, directory: Path | str, index: Mapping[str, Any]) -> None:
    """Tables of splits, sources and hazards, then the warnings."""
    console.print(_splits_table(index))
    if index["sources"]:
        console.print(_sources_table(index))
    hazards = {name: count for name, count in index["hazards"].items() if count}
    if hazards:
        console.print(_hazards_table(hazards))
    for warning in list_warnings(index):
        console.print(Panel(warning, title="WARNING", border_style="bold red"), style="bold")
    console.print(f"corpus: {directory}  (fingerprint {index['fingerprint'][:16]})", markup=False)


def list_warnings(index: Mapping[str, Any]) -> list[str]:
    """What a user must know before training on the corpus, one sentence or two each."""
    warnings = []
    for name, result in index["alignment"].items():
        seen = f"(AUC {result['auc']:.3f} over {result['rows']} pairs, chance is 0.5)"
        if result["verdict"] == "misaligned":
            warnings.append(
                f"{name} is MISALIGNED: its texts fit their molecules no better than "
                f"shuffled texts do {seen}. "
                "Check that SMILES and text columns come from the same rows; do not train on it."
            )
        elif result["verdict"] == "partly misaligned":
            lines = ", ".join(f"{first}-{last}" for first, last in result["suspect_lines"])
            warnings.append(
                f"{name} is PARTLY MISALIGNED: around lines {lines} the texts fit their molecules no better "
                f"than shuffled texts do, elsewhere they fit {seen}. Check for a lost or doubled line."
            )
    for overlap in index["counts"].get("overlap", []):
        if overlap["molecules"]:
            one, other = overlap["splits"]
            warnings.append(
                f"splits {one} and {other} share {overlap['molecules']:,} molecules: an evaluation on either "
                "is not zero-shot. Build the one first and the other with --exclude."
            )
    lost = sum(repair["lost_records"] for repair in index.get("repairs", []))
    if lost:
        warnings.append(
            f"{lost:,} records were damaged and lost in repairs: build the corpus again to have them."
        )
    rows, rejected = index["counts"].get("rows", 0), index["counts"].get("rejected", 0)
    if rejected > 0.1 * rows:
        warnings.append(f"{rejected:,} of {rows:,} rows were rejected: see rejected.jsonl for the reasons.")
    return warnings


def _splits_table(index: Mapping[str, Any]) -> Table:
    table = Table(title="Splits", title_justify="left")
    table.add_column("split")
    for name in ("records", "molecules", "texts", "shards", "MB"):
        table.add_column(name, justify="right")
    counts = index["counts"].get("splits", {})
    for name, split in index["splits"].items():
        table.add_row(
            name,
            f"{split['num_records']:,}",
            *(f"{counts[name][key]:,}" if name in counts else "-" for key in ("molecules", "texts")),
            f"{len(split['shards']):,}",
            f"{sum(shard['bytes'] for shard in split['shards']) / 1e6:.1f}",
        )
    return table


def _sources_table(index: Mapping[str, Any]) -> Table:
    table = Table(title="Sources", title_justify="left")
    table.add_column("file", overflow="fold")
    for name in ("rows", "rejected", "left out"):
        table.add_column(name, justify="right")
    table.add_column("text fits molecule")
    for source in index["sources"]:
        result = index["alignment"].get(source.get("name"))
        table.add_row(
            str(source.get("name", "-")),
            *(f"{source[key]:,}" if key in source else "-" for key in ("rows", "rejected", "excluded")),
            f"{result['verdict']}, AUC {result['auc']:.3f} ({result['rows']} pairs)" if result else "-",
        )
    return table


def _hazards_table(hazards: Mapping[str, int]) -> Table:
    table = Table(title="Hazards", title_justify="left")
    table.add_column("hazard")
    table.add_column("rows", justify="right")
    table.add_column("meaning")
    for name, count in hazards.items():
        table.add_row(name, f"{count:,}", HAZARDS.get(name, ""))
    return table
