"""A training run, from a configuration to its last checkpoint: read it from top to bottom."""

import time
from collections.abc import Iterator

from torch import Tensor

from atomas.config import Config
from atomas.data.batching import PairBatch
from atomas.distributed.agreement import any_rank, each_of_any_rank
from atomas.distributed.process_group import process_group
from atomas.distributed.watchdog import Watchdog, watch
from atomas.phases import phase
from atomas.tasks.retrieval import evaluate_retrieval
from atomas.training.engine import GradientNorm, set_learning_rate
from atomas.training.instruments import Instruments
from atomas.training.meter import StepMeter
from atomas.training.run_directory import StopSignal
from atomas.training.schedule import learning_rate
from atomas.training.session import Session
from atomas.training.step import contrastive_step
from atomas.training.telemetry import logger
from atomas.training.tracking import Records

RESUME_EXIT_CODE = 75
"""EX_TEMPFAIL: the run was asked to stop, has saved, and wants to be started again."""

SHOWN = {"loss": "loss", "pairs/s": "pairs_per_second", "tokens/s": "tokens_per_second", "MFU": "mfu"}
"""On the console: names for people, and keys of the record."""


def train(config: Config) -> int:
    """Train until `training.max_steps`, continuing the run's newest checkpoint where there is one.

    Returns:
        The exit code: 0 when the last step is done, RESUME_EXIT_CODE after a stop that was asked for.
    """
    with (
        StopSignal() as stop,
        process_group(config.run) as (placement, device),
        watch(config.run, placement) as watchdog,
    ):
        session = Session.open(config, placement, device)
        watchdog.folder = session.run.attempt_path
        with Instruments.of(session) as instruments:
            return _run_steps(session, stop, instruments, watchdog)


def _run_steps(session: Session, stop: StopSignal, instruments: Instruments, watchdog: Watchdog) -> int:
    config, run, device = session.config, session.run, session.device
    records, meter = instruments.records, instruments.meter
    total = config.training.max_steps
    if session.step >= total:
        logger.info("step %d of %d is done: nothing left to do", session.step, total)
        return 0
    if any_rank(session.placement.rank == 0 and run.kill_requested(), device):
        logger.warning("%s exists: remove it to go on", run.path / "KILL")
        return RESUME_EXIT_CODE
    session.saver.report = lambda saved: records.write("checkpoint", saved.step, saved.record())
    batches = iter(session.batches())
    session.engine.train()
    meter.begin()
    while session.step < total:
        watchdog.begin_step(session.step + 1)
        with instruments.trace.step(session.step + 1):
            record = _train_step(session, batches, meter)
        session.step += 1
        records.write("train", session.step, record)
        instruments.memory.after_step()
        instruments.progress.step(session.step, {name: record[key] for name, key in SHOWN.items()})

        last = session.step == total
        evaluating = config.evaluation.every > 0 and (last or session.step % config.evaluation.every == 0)
        best_score = _evaluate(session, records) if evaluating else None
        # Votes, so that no rank saves or stops alone: a signal may reach only one of them.
        is_rank_zero = session.placement.rank == 0
        stopping, asked_to_save, busy, failed = each_of_any_rank(
            [
                stop.received is not None or (is_rank_zero and run.kill_requested()),
                is_rank_zero and run.take_save_request(),
                session.saver.busy,
                session.saver.failed,
            ],
            device,
        )
        session.saver.advance(busy, failed)
        due = config.checkpoint.every > 0 and session.step % config.checkpoint.every == 0
        saving = last or due or best_score is not None or stopping or asked_to_save
        if saving:
            session.save(score=best_score, wait=last or stopping)
        if stopping and not last:
            logger.warning(
                "stopped after step %d and saved: start the same command again to continue", session.step
            )
            return RESUME_EXIT_CODE
        if evaluating or saving or session.step in config.training.traced:
            meter.begin()  # none of it, nor writing a trace, is part of a step
    return 0


def _train_step(session: Session, batches: Iterator[PairBatch], meter: StepMeter) -> dict[str, float]:
    """One optimizer step over `gradient_accumulation_steps` contrastive batches; returns what is logged."""
    config, engine, momentum, device = session.config, session.engine, session.momentum, session.device
    rate = learning_rate(config, session.step)
    set_learning_rate(engine, rate)
    with phase("momentum"):
        session.update_momentum()
    accumulation = config.training.gradient_accumulation_steps
    means: dict[str, Tensor] = {}
    norm = GradientNorm(engine)
    for _ in range(accumulation):
        with phase("data"):
            batch = next(batches)
            meter.count(batch, queue=0 if momentum is None else momentum.queue.filled)
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
            norm.before_step()
            engine.step()  # steps the optimizer at the last batch of the accumulation
        for name, value in losses.items():
            means[name] = means.get(name, 0) + value / accumulation
    return {
        **meter.end(means),
        "learning_rate": rate,
        "gradient_norm": norm.value(),
        "samples": (session.step + 1) * accumulation * config.data.batch_size,
    }


def _evaluate(session: Session, records: Records) -> float | None:
    """Retrieval on the validation split; the score if it is the best so far. Collective."""
    started = time.perf_counter()
    session.engine.eval()
    with phase("evaluation"), session.autocast():
        result = evaluate_retrieval(session.engine.module, session.validation_batches(), session.device)
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
