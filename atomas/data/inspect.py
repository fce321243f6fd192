"""`atomas data inspect`: read a whole corpus and show what is in it."""

from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from atomas.data.progress import Progress
from atomas.data.report import make_console, print_index
from atomas.data.shards import Corpus, Record, ShardedSplit
from atomas.data.shuffle_quality import measure_shuffle
from atomas.errors import AtomasError

BAR_WIDTH = 32
SIDES = ("smiles", "text")
Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class OrderOptions:
    """The order of training that is looked at: keys of the same names in a run's configuration."""

    seed: int = 0
    window_blocks: int = 64
    group_shards: int = 64


def inspect_corpus(
    location: Path | str, *, tokenizer: str | None = None, samples: int = 3, order: OrderOptions | None = None
) -> None:
    """Print counts, hazards, length histograms, shuffle quality and `samples` records of every split, on stdout.

    `location` is a folder or an address. Every block is read and its checksum verified. `tokenizer` (a folder or hub
    name) adds the lengths in tokens. Raises AtomasError if any of it cannot be read.
    """
    if samples < 0:
        raise AtomasError(f"--samples {samples}: 0 or more is needed")
    corpus = Corpus.open(location)
    encoder = None
    if tokenizer is not None:
        from atomas.data.tokenizer import AtomasTokenizer

        encoder = AtomasTokenizer.load(tokenizer)
    console = make_console()
    print_index(console, location, corpus.index)
    for split in corpus.splits.values():
        lengths: dict[tuple[str, str], array[int]] = {}
        with Progress(f"reading {split.name}", split.num_records, unit="records") as progress:
            for number in range(len(split.blocks)):
                block = split.read_block(number)
                for side in SIDES:
                    strings = [record[side] for record in block]
                    lengths.setdefault((side, "characters"), array("Q")).extend(map(len, strings))
                    if encoder is not None:
                        tokens = lengths.setdefault((side, "tokens"), array("Q"))
                        tokens.extend(map(len, encoder.encode_batch(strings)))
                progress.update(len(block))
        for (side, unit), values in lengths.items():
            title = f"{split.name}: length of {side} in {unit}"
            console.print(histogram(np.asarray(values, dtype=np.int64), title, unit))
        console.print(_shuffle_table(split, order or OrderOptions()))
        _print_samples(console, split, samples)


def _shuffle_table(split: ShardedSplit, order: OrderOptions) -> Table:
    """How far the order of training takes neighbours apart."""
    quality = measure_shuffle(split, **asdict(order))
    table = Table(
        title=f"{split.name}: order of training", title_justify="left", show_edge=False, show_header=False
    )
    table.caption = (
        f"seed {order.seed}, windows of {order.window_blocks} blocks, groups of {order.group_shards} shards; "
        f"{quality.positions:,} samples of the first epoch"
    )
    table.caption_justify = "left"
    table.add_row(
        "correlation of neighbouring ids", f"{quality.neighbours:+.4f} (chance: 0 ± {quality.noise:.4f})"
    )
    table.add_row("neighbours from the same block", f"{quality.same_block:.2%}")
    table.add_row("correlation of ids with the position", f"{quality.drift:+.4f}")
    return table


def histogram(lengths: Lengths, title: str, unit: str) -> Table:
    """Lengths [N] in bins that double, with mean, median, 99th percentile and longest in the caption."""
    edges = [0, 8]
    while edges[-1] <= lengths.max():
        edges.append(2 * edges[-1])
    counts, _ = np.histogram(lengths, bins=edges)
    table = Table(title=title, title_justify="left", caption_justify="left", show_edge=False)
    table.caption = (
        f"mean {lengths.mean():.1f}, median {np.median(lengths):.0f}, "
        f"99 % below {np.quantile(lengths, 0.99):.0f}, longest {lengths.max()}"
    )
    table.add_column(unit, justify="right")
    table.add_column("records", justify="right")
    table.add_column("", width=BAR_WIDTH)
    for start, stop, count in zip(edges, edges[1:], counts.tolist(), strict=False):
        table.add_row(f"{start}-{stop - 1}", f"{count:,}", _bar(count / counts.max()))
    return table


def _bar(share: float) -> str:
    eighths = round(share * BAR_WIDTH * 8)
    if share and not eighths:
        eighths = 1
    full, rest = divmod(eighths, 8)
    return "\u2588" * full + ("\u258f\u258e\u258d\u258c\u258b\u258a\u2589"[rest - 1] if rest else "")


def _print_samples(console: Console, split: ShardedSplit, samples: int) -> None:
    """Records spread evenly over the split."""
    count = min(samples, split.num_records)
    wanted = [index * split.num_records // count for index in range(count)]
    for number, record in zip(wanted, _records_at(split, wanted), strict=True):
        console.print(Text(f"\n{split.name}[{number}]", style="bold"), soft_wrap=True)
        for key, value in record.items():
            console.print(Text(f"  {key}: {value}"), soft_wrap=True)


def _records_at(split: ShardedSplit, wanted: Sequence[int]) -> list[Record]:
    ends = np.cumsum([block.num_records for block in split.blocks])
    found = []
    for number in wanted:
        block = int(np.searchsorted(ends, number, side="right"))
        start = int(ends[block]) - split.blocks[block].num_records
        found.append(split.read_block(block)[number - start])
    return found
