"""A training run, from a configuration to its last checkpoint: read it from top to bottom."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from atomas.config import Config
from atomas.data.batching import PairBatch
from atomas.data.loader import OrderedItems
from atomas.distributed.agreement import any_rank, each_of_any_rank
from atomas.distributed.collectives import all_gather_sizes
from atomas.distributed.process_group import process_group
from atomas.distributed.watchdog import Watchdog, watch
from atomas.phases import phase
from atomas.tasks.retrieval import evaluate_retrieval
from atomas.training.engine import OptimizerStep, set_learning_rate
from atomas.training.instruments import Instruments
from atomas.training.meter import StepMeter
from atomas.training.schedule import learning_rate
from atomas.training.session import Session
from atomas.training.stability import BAD_STEPS, keep_batches
from atomas.training.step import contrastive_step
from atomas.training.stop_signal import StopSignal
from atomas.training.telemetry import logger
from atomas.training.tracking import Records
from atomas_launcher.process import RESUME_EXIT_CODE

SHOWN = {"loss": "loss", "pairs/s": "pairs_per_second", "tokens/s": "tokens_per_second", "MFU": "mfu"}
"""On the console: names for people, and keys of the record."""


def train(config: Config, stop: StopSignal) -> int:
    """Train until `training.max_steps`, continuing the run's newest checkpoint where there is one.

    Returns:
        The exit code: 0 when the last step is done, RESUME_EXIT_CODE after a stop that was asked for.
    """
    with (
        process_group(config.run) as (placement, device),
        watch(config.run, placement) as watchdog,
    ):
        stop.after_grace(config.run.grace_seconds, watchdog.end_overdue)
        session = Session.open(config, placement, device)
        watchdog.write_flight_to(session.run.attempt_path)
        with contextlib.closing(session), Instruments.of(session) as instruments:
            return _run_steps(session, stop, instruments, watchdog)


def _run_steps(session: Session, stop: StopSignal, instruments: Instruments, watchdog: Watchdog) -> int:
    config, run, device = session.config, session.run, session.device
    records, meter = instruments.records, instruments.meter
    total = config.training.max_steps
    if session.step >= total:
        logger.info("step %d of %d is done: nothing left to do", session.step, total)
        return 0
    if any_rank(_stop_wanted(session, stop), device):
        logger.warning("stopped before step %d: there is nothing new to save", session.step + 1)
        return RESUME_EXIT_CODE
    session.saver.report = lambda saved: records.write("checkpoint", saved.step, saved.record())
    batches = iter(session.batches())
    session.engine.train()
    meter.begin()
    due = False
    while session.step < total:
        watchdog.begin_step(session.step + 1)
        with instruments.trace.step(session.step + 1):
            step = _train_step(session, batches, meter)
        session.step += 1
        skipped = [one for batch in step.batches for one in batch.skipped]
        session.note_skipped(skipped, int(step.record["skipped"]))
        judgement = session.stability.judge(session.step, step.record["loss"], left_out=step.left_out)
        records.write("train", session.step, step.record | session.stability.record())
        instruments.memory.after_step()
        instruments.progress.step(session.step, {name: step.record[key] for name, key in SHOWN.items()})
        if judgement.remark:
            _keep_bad_step(session, step, judgement.remark)
        if judgement.trouble:
            session.roll_back(judgement.trouble)
            batches = iter(session.batches())
            due = False
            meter.begin()
            continue

        last = session.step == total
        evaluating = config.evaluation.every > 0 and (last or session.step % config.evaluation.every == 0)
        best_score = _evaluate(session, records, stop) if evaluating else None
        # Votes, so that no rank saves or stops alone: a signal may reach only one of them.
        asked_to_save = session.placement.rank == 0 and run.take_save_request()
        votes = [_stop_wanted(session, stop), asked_to_save, session.saver.busy, session.saver.failed]
        stopping, asked_to_save, busy, failed = each_of_any_rank(votes, device)
        session.saver.advance(busy, failed)
        due = due or (config.checkpoint.every > 0 and session.step % config.checkpoint.every == 0)
        wanted = (due or best_score is not None) and not session.stability.in_doubt
        saving = last or wanted or stopping or asked_to_save
        if saving:
            session.save(score=best_score, wait=last or stopping)
            due = False
        if stopping and not last:
            logger.warning(
                "stopped after step %d and saved: start the same command again to continue", session.step
            )
            return RESUME_EXIT_CODE
        if evaluating or saving or session.step in config.training.traced:
            meter.begin()  # none of it, nor writing a trace, is part of a step
    return 0


@dataclass(frozen=True, kw_only=True)
class _Step:
    """What an optimizer step did."""

    record: dict[str, float]
    """What is logged: of all ranks"""
    left_out: bool
    """Something was not finite, so that the optimizer did not step"""
    batches: list[PairBatch]
    """This rank's, on the host"""
    own_losses: dict[str, float]
    """Of this rank alone"""


def _train_step(session: Session, batches: OrderedItems[PairBatch], meter: StepMeter) -> _Step:
    """One optimizer step over `gradient_accumulation_steps` contrastive batches."""
    config, engine, momentum, device = session.config, session.engine, session.momentum, session.device
    rate = learning_rate(config, session.step)
    set_learning_rate(engine, rate)
    with phase("momentum"):
        session.update_momentum()
    accumulation = config.training.gradient_accumulation_steps
    means: dict[str, Tensor] = {}
    taken = []
    loader_cpu_seconds = batches.cpu_seconds
    optimizer_step = OptimizerStep(engine)
    for _ in range(accumulation):
        with phase("data"):
            batch = next(batches)
            meter.count(batch, queue=0 if momentum is None else momentum.queue.filled)
            taken.append(batch)
            batch = batch.to(device)
        losses = contrastive_step(
            engine,
            momentum,
            batch,
            micro_batches=session.micro_batches,
            cache=config.training.feature_cache,
            autocast=session.autocast,
        )
        with phase("optimizer"):
            optimizer_step.take()
        for name, value in losses.items():
            means[name] = means.get(name, 0) + value / accumulation
    record = {
        **meter.end(means, batches.cpu_seconds - loader_cpu_seconds),
        "learning_rate": rate,
        "gradient_norm": optimizer_step.norm,
        "samples": (session.step + 1) * accumulation * config.data.batch_size,
    }
    # where the loss is finite an fp16 gradient that is not is what the loss scale is for
    left_out = optimizer_step.left_out and not (
        config.training.precision == "fp16" and math.isfinite(record["loss"])
    )
    own = {name: float(value) for name, value in means.items()} if left_out else {}
    return _Step(record=record, left_out=left_out, batches=taken, own_losses=own)


def _keep_bad_step(session: Session, step: _Step, remark: str) -> None:
    """Say what is wrong with the step, on which ranks, and keep its batches. Collective."""
    finite = all(math.isfinite(value) for value in step.own_losses.values())
    ranks = all_gather_sizes(int(not finite), session.device, "ranks with a loss that is not finite")
    if any(ranks):
        remark += f", that of the loss on rank {', '.join(str(r) for r, bad in enumerate(ranks) if bad)}"
    folder = session.run.attempt_path / BAD_STEPS / f"step_{session.step:08d}"
    if session.placement.rank == 0:
        logger.warning("%s; its batches are kept in %s", remark, folder)
    about = {"step": session.step, "remark": remark, "losses": step.own_losses, "record": step.record}
    try:
        keep_batches(folder, session.placement.rank, step.batches, session.tokenizer, about)
    except OSError as error:
        logger.warning("the batches of step %d cannot be kept: %s", session.step, error)


def _stop_wanted(session: Session, stop: StopSignal) -> bool:
    """This rank has been asked to stop: to be voted on."""
    if session.placement.rank == 0 and session.run.kill_requested():
        logger.warning("%s exists: remove it to go on", session.run.path / "KILL")
        return True
    return stop.received is not None


class _StoppedError(Exception):
    """Somebody asked to stop in the midst of an evaluation; raised on all ranks together."""


def _evaluate(session: Session, records: Records, stop: StopSignal) -> float | None:
    """Retrieval on the validation split; the score if it is the best so far. Collective."""

    def batches() -> Iterator[tuple[PairBatch, int]]:
        for batch in session.validation_batches():
            if any_rank(_stop_wanted(session, stop), session.device):
                raise _StoppedError
            yield batch

    started = time.perf_counter()
    session.engine.eval()
    try:
        with phase("evaluation"), session.autocast():
            result = evaluate_retrieval(session.engine.module, batches(), session.device)
    except _StoppedError:
        logger.warning("the evaluation of step %d is left out: asked to stop", session.step)
        return None
    finally:
        session.engine.train()
    values = {
        f"{direction}/{name}": value
        for direction, direction_metrics in result.metrics["global"].items()
        for name, value in direction_metrics.as_dict().items()
    }
    values["seconds"] = time.perf_counter() - started
    records.write("validation", session.step, values)
    logger.info("step %d validation: %s", session.step, result.summary("global"))
    score = result.mean_reciprocal_rank("global")
    return score if score > session.saver.best_score else None
