"""Do words point at the atoms that they speak of? Measured where the truth is known: on the demo corpus.

A record's `grounding` lists spans of the text and the atoms that each of them describes. At every level, the
tokens of a span are scored against the SMILES tokens (at higher levels: the clusters that hold them) by their mean
cosine; the best-matching one scores the share of its atoms that are among the right ones. This is the pointing
game of visual grounding (Zhang et al., 2016), with a share in place of a hit because a cluster has more than one
place. Tokens that write no atom and no bond (</s>, dots) cannot be pointed at. Chance is what a token or cluster
drawn at random would score; it is computed, not sampled.
"""

import copy
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from atomas.config import Config
from atomas.data.progress import Progress
from atomas.data.shards import Corpus, Record
from atomas.data.tokenizer import AtomasTokenizer
from atomas.distributed.process_group import resolve_device
from atomas.errors import AtomasError
from atomas.interpretation.correspondence import LevelCorrespondence, PairCorrespondence, correspondences
from atomas.interpretation.smiles_atoms import scan_smiles
from atomas.json_files import write_json
from atomas.model.atomas import AtomasModel
from atomas.model.backbone import t5_from_config
from atomas.training.checkpoint import resolve_checkpoint, verify_checkpoint
from atomas.training.model_files import build_model, read_model
from atomas.training.telemetry import environment

RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over spans, and its 95 % bootstrap interval over rows."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class LevelGrounding:
    """Scores of one level, in [0, 1]; differences are paired span by span."""

    accuracy: Estimate
    chance: Estimate
    untrained: Estimate
    above_chance: Estimate
    above_untrained: Estimate


@dataclass(frozen=True, kw_only=True)
class GroundingResult:
    """Of a whole split."""

    rows: int
    spans: int
    spans_cut: int
    """Spans behind the end of a text that the model reads only in part; not counted in `spans`"""
    levels: dict[int, LevelGrounding]


def evaluate_grounding(
    model: AtomasModel,
    untrained: AtomasModel,
    tokenizer: AtomasTokenizer,
    records: Sequence[Record],
    *,
    max_text_tokens: int,
    batch_size: int,
    seed: int,
) -> GroundingResult:
    """Score `records`, which have a `grounding`; `seed` is that of the bootstrap. Both in evaluation mode."""
    sums: dict[int, list[NDArray[np.float64]]] = {}
    counts: list[int] = []
    cut = 0
    with Progress("grounding", len(records), unit="rows") as progress:
        for first in range(0, len(records), batch_size):
            batch = records[first : first + batch_size]
            pairs = [(record["text"], record["smiles"]) for record in batch]
            seen = [
                correspondences(one, tokenizer, pairs, max_text_tokens=max_text_tokens)
                for one in (model, untrained)
            ]
            for record, trained, random in zip(batch, *seen, strict=True):
                spans = _spans(record, trained)
                cut += len(record["grounding"]) - len(spans)
                counts.append(len(spans))
                regions = _regions(trained)
                for number, (level, other) in enumerate(zip(trained.levels, random.levels, strict=True)):
                    own = _point(level, spans, regions)
                    row = [own[:, 0], own[:, 1], _point(other, spans, regions)[:, 0]]
                    sums.setdefault(number, []).append(np.sum(row, axis=1))
            progress.update(len(batch))
    if not sum(counts):
        raise AtomasError("no row has a described span that the model reads")
    numbers = [level.number for level in trained.levels]
    return GroundingResult(
        rows=len(counts),
        spans=sum(counts),
        spans_cut=cut,
        levels={
            number: _level(np.array(sums[position]), np.array(counts), seed)
            for position, number in enumerate(numbers)
        },
    )


def grounding_report(
    *,
    checkpoint: Path,
    best: bool,
    data: Path | str,
    split: str,
    max_rows: int | None,
    momentum: bool,
    batch_size: int,
    device_name: str,
    seed: int,
    report: Path | None,
) -> GroundingResult:
    """Verify and load a checkpoint, score a split, print the table, and write `report`.

    Raises:
        AtomasError: the checkpoint or corpus is missing or damaged, or the corpus has no grounding.
    """
    folder = resolve_checkpoint(checkpoint, best=best)
    manifest = verify_checkpoint(folder)
    device = resolve_device(device_name, 0)
    corpus = Corpus.open(data)
    records = list(islice(corpus.split(split), max_rows))
    if not records or any("grounding" not in record for record in records):
        raise AtomasError(
            f"split {split!r} of {data} has no grounding: only a corpus of `atomas data demo` knows the truth"
        )
    model, tokenizer, config = read_model(folder, momentum=momentum)
    result = evaluate_grounding(
        model.to(device),
        _untrained(model, tokenizer, config, seed).to(device),
        tokenizer,
        records,
        max_text_tokens=config.data.max_text_tokens,
        batch_size=batch_size,
        seed=seed,
    )
    _show(result, folder, split)
    if report is not None:
        content = {
            "task": "grounding",
            "command": shlex.join(["atomas", *sys.argv[1:]]),
            "checkpoint": str(checkpoint),
            "step": manifest["step"],
            "weights": "momentum" if momentum else "online",
            "corpus": {"path": str(data), "split": split, "fingerprint": corpus.fingerprint},
            "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
            "seed": seed,
            "interval": f"95 %, percentiles of {RESAMPLES} resamplings of rows",
            **asdict(result),
            "environment": environment(device, 1),
        }
        write_json(report, content)
        print(f"report: {report}")
    return result


def _untrained(model: AtomasModel, tokenizer: AtomasTokenizer, config: Config, seed: int) -> AtomasModel:
    """The same architecture with random weights; its decoder, which is not asked, is left out."""
    torch.manual_seed(seed)
    t5 = t5_from_config(copy.deepcopy(model.encoder.backbone.t5.config), decoder=False, tied=True)
    return build_model(config, tokenizer.vocab_size, t5=t5).eval()


Span = tuple[NDArray[np.int64], set[int]]
"""Text tokens of a described span, and the atoms that it describes"""


def _spans(record: Record, pair: PairCorrespondence) -> list[Span]:
    """The spans that at least one token of the text touches."""
    starts, ends = np.array(pair.text_offsets).T
    spans = []
    for span in record["grounding"]:
        tokens = np.flatnonzero((starts < span["end"]) & (ends > span["start"]) & (starts < ends))
        if len(tokens):
            spans.append((tokens, set(span["atoms"])))
    return spans


def _regions(pair: PairCorrespondence) -> list[set[int]]:
    """Atoms of every SMILES token; none for </s> and dots."""
    characters = scan_smiles(pair.smiles)
    return [characters.region(start, end) for start, end in pair.smiles_offsets]


def _point(level: LevelCorrespondence, spans: list[Span], regions: list[set[int]]) -> NDArray[np.float64]:
    """[spans, 2]: score of the best-matching cluster, and the mean score of all clusters."""
    members = [
        [regions[token] for token in np.flatnonzero(level.smiles.cluster == cluster) if regions[token]]
        for cluster in range(len(level.smiles.weight))
    ]
    places = [number for number, held in enumerate(members) if held]
    similarity = level.similarity[:, places]
    scores = np.empty((len(spans), 2))
    for number, (tokens, atoms) in enumerate(spans):
        shares = [np.mean([len(held & atoms) / len(held) for held in members[place]]) for place in places]
        best = similarity[level.text.cluster[tokens]].mean(axis=0).argmax()
        scores[number] = shares[best], np.mean(shares)
    return scores


def _level(sums: NDArray[np.float64], counts: NDArray[np.int64], seed: int) -> LevelGrounding:
    """`sums` [rows, 3] over each row's spans: of the model, of chance, of the untrained model."""
    draws = np.random.default_rng(seed).multinomial(
        len(counts), np.full(len(counts), 1 / len(counts)), size=RESAMPLES
    )

    def estimate(values: NDArray[np.float64]) -> Estimate:
        means = (draws @ values) / np.maximum(draws @ counts, 1)
        low, high = np.percentile(means, [2.5, 97.5])
        return Estimate(value=float(values.sum() / counts.sum()), low=float(low), high=float(high))

    model, chance, untrained = sums.T
    return LevelGrounding(
        accuracy=estimate(model),
        chance=estimate(chance),
        untrained=estimate(untrained),
        above_chance=estimate(model - chance),
        above_untrained=estimate(model - untrained),
    )


def _show(result: GroundingResult, checkpoint: Path, split: str) -> None:
    table = Table(
        title=f"{checkpoint.name}: {result.spans} described spans in {result.rows} rows of {split!r}",
        caption="share of the best-matching SMILES tokens that lie in the right atoms, %; [95 % interval over rows]",
    )
    for column in ("level", "model", "chance", "untrained", "model - chance", "model - untrained"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, level in result.levels.items():
        table.add_row(str(number), *map(_percent, _estimates(level)))
    console = Console()
    console.width = max(console.width, 130)
    console.print(table)


def _estimates(level: LevelGrounding) -> Iterator[Estimate]:
    yield from (level.accuracy, level.chance, level.untrained, level.above_chance, level.above_untrained)


def _percent(estimate: Any) -> str:
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
