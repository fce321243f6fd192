"""Captions or molecules written for a whole split, from a checkpoint to scores: resumable, on any number of ranks."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from atomas.config import RunConfig
from atomas.data.parallel import available_cores
from atomas.data.progress import Progress
from atomas.data.report import make_console
from atomas.data.shards import Corpus
from atomas.data.tokenizer import AtomasTokenizer
from atomas.distributed.agreement import together
from atomas.distributed.process_group import process_group
from atomas.distributed.sharded_weights import shard_weights
from atomas.distributed.watchdog import watch
from atomas.errors import AtomasError
from atomas.json_files import write_json
from atomas.metrics.caption_tokenizer import CaptionTokenizer
from atomas.metrics.resampling import Bootstrap
from atomas.metrics.scores import Scores, print_scores
from atomas.tasks.decoding import SOURCE, TARGET, DecodingSettings, Task, Writer, warn_of_other_task
from atomas.tasks.prediction_file import write_predictions
from atomas.tasks.prediction_log import PredictionLog
from atomas.tasks.predictions import references_sha256, score
from atomas.tasks.report import training_config
from atomas.training.checkpoint import resolve_checkpoint, verify_checkpoint
from atomas.training.model_files import read_model
from atomas.training.telemetry import environment
from atomas_launcher.placement import Placement

SCORED_AS = {"captioning": "caption", "generation": "molecule"}


@dataclass(frozen=True, kw_only=True)
class GenerationRun:
    """What is written with what, and where it goes."""

    task: Task
    checkpoint: Path
    best: bool
    """of a run folder the best checkpoint instead of the newest"""
    momentum: bool
    """the momentum copy's weights"""
    data: Path | str
    split: str
    max_rows: int | None
    report: Path
    batch_size: int
    """inputs that are decoded together"""
    device: Literal["auto", "cpu", "cuda"]
    shard_weights: bool
    """1/W of the weights on each rank (ZeRO stage 3)"""
    decoding: DecodingSettings
    tokenizer: str | None
    """of caption BLEU, see `predictions_report`"""
    bootstrap: Bootstrap


@dataclass(frozen=True, kw_only=True)
class _Row:
    number: int
    """in the split"""
    source: str
    reference: str


def generation_report(run: GenerationRun) -> Scores | None:
    """Write outputs for every row of the split, score them, and leave report and predictions.

    Ranks share the rows; each finished row is kept at once next to the report, so that the same command continues
    after a cut. Returns the scores on rank 0 and None on the others. Collective.

    Raises:
        AtomasError: checkpoint or corpus are missing or damaged, or the rows that are already there were made with
            other settings.
    """
    if run.tokenizer is not None:
        CaptionTokenizer.load(run.tokenizer)  # a mistake is answered before anything is written
    folder = resolve_checkpoint(run.checkpoint, best=run.best)
    limits = RunConfig(device=run.device)
    with process_group(limits) as (placement, device), watch(limits, placement):
        with together("loading the checkpoint"):
            manifest = verify_checkpoint(folder)
            model, tokenizer, config = read_model(folder, momentum=run.momentum)
            corpus = Corpus.open(run.data)
            rows = _rows(corpus, run)
            writer = Writer(
                model.to(device),
                tokenizer,
                run.decoding,
                task=run.task,
                device=device,
                synchronized=run.shard_weights,
            )
        if placement.rank == 0:
            warn_of_other_task(run.task, config.loss.task, folder)
        if run.shard_weights:
            shard_weights(model)
        about = {
            "task": run.task,
            "checkpoint": str(run.checkpoint),
            "step": manifest["step"],
            "weights": "momentum" if run.momentum else "online",
            "weights_sha256": manifest["files"]["model/model.safetensors"]["sha256"],
            "corpus": {"path": str(run.data), "split": run.split, "fingerprint": corpus.fingerprint},
            "decoding": asdict(run.decoding),
        }
        log = _open_log(run, about, placement.rank)
        outputs = _write_all(log, writer, rows, run.batch_size, tokenizer, placement)
        if placement.rank != 0:
            return None
        told = environment(device, placement.world_size)
    predictions = run.report.with_suffix(".predictions.tsv")
    kind = SCORED_AS[run.task]
    write_predictions(predictions, kind, [(row.source, row.reference, outputs[row.number]) for row in rows])
    scores = score(
        kind,
        references := [row.reference for row in rows],
        [outputs[row.number] for row in rows],
        tokenizer=run.tokenizer,
        bootstrap=run.bootstrap,
        workers=1 if device.type == "cuda" else available_cores(),  # a process that uses CUDA does not fork
    )
    console = make_console()
    print_scores(console, scores, f"{folder.name}: {run.task} of {len(rows):,} rows of {run.split!r}")
    write_json(
        run.report,
        about
        | {
            "command": shlex.join(["atomas", *sys.argv[1:]]),
            "predictions": str(predictions),
            "references_sha256": references_sha256(references),
            "model_tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
            "seed": config.run.seed,
            "training": training_config(config),
            "environment": told,
            **scores.as_json(),
        },
    )
    log.remove()
    console.print(f"predictions: {predictions}\nreport: {run.report}", markup=False, soft_wrap=True)
    return scores


def _rows(corpus: Corpus, run: GenerationRun) -> list[_Row]:
    """The rows to be written, in stored order. A long source is read whole: only a target could be cut."""
    split = corpus.split(run.split)
    source, target = SOURCE[run.task], TARGET[run.task]
    records = (record for block in range(len(split.blocks)) for record in split.read_block(block))
    rows = [
        _Row(number=number, source=record[source], reference=record[target])
        for number, record in zip(range(run.max_rows or split.num_records), records, strict=False)
    ]
    if not rows:
        raise AtomasError(f"split {run.split!r} of {run.data} is empty")
    return rows


def _open_log(run: GenerationRun, about: Mapping[str, Any], rank: int) -> PredictionLog:
    folder = run.report.with_suffix(".unfinished")
    log = None
    with together("opening the finished rows"):
        if rank == 0:
            log = PredictionLog(folder, about, rank=rank)
    with together("opening the finished rows"):
        return log or PredictionLog(folder, about, rank=rank)


def _write_all(
    log: PredictionLog,
    writer: Writer,
    rows: Sequence[_Row],
    batch_size: int,
    tokenizer: AtomasTokenizer,
    placement: Placement,
) -> dict[int, str]:
    """Output of every row by its number; on rank 0, the others may see fewer. Collective."""
    with together("reading the finished rows"):  # nobody adds a row before all have read
        finished = log.finished()
    missing = [row for row in rows if row.number not in finished]
    lengths = [len(ids) for ids in tokenizer.encode_batch([row.source for row in missing])]
    # The longest first, and like lengths side by side: no rank waits long for another.
    order = sorted(range(len(missing)), key=lambda place: -lengths[place])
    batches = [
        [missing[place] for place in order[first : first + batch_size]]
        for first in range(0, len(order), batch_size)
    ]
    world = placement.world_size
    label = "writing" if len(missing) == len(rows) else f"writing (continued behind {len(finished):,} rows)"
    hidden = placement.rank != 0
    progress = Progress(label, len(rows), unit="rows", initial=len(rows) - len(missing), hidden=hidden)
    with log, progress:
        for first in range(0, len(batches), world):
            turn = batches[first : first + world]
            # A rank without a batch of its own repeats one: where weights are spread it must take part.
            batch = turn[min(placement.rank, len(turn) - 1)]
            if placement.rank < len(turn) or writer.synchronized:
                written = writer.write([row.source for row in batch], seed=batch[0].number)
                if placement.rank < len(turn):
                    log.add((row.number, best) for row, (best, *_) in zip(batch, written, strict=True))
            progress.update(sum(map(len, turn)))
    with together("writing"):  # a rank may be through long before the others
        return log.finished() if placement.rank == 0 else finished
