"""A training run, from a configuration to its last checkpoint: read it from top to bottom."""

import time
from collections.abc import Iterator

from atomas.config import Config
from atomas.data.batching import PairBatch
from atomas.distributed.agreement import any_rank, mean_over_ranks
from atomas.distributed.process_group import process_group
from atomas.tasks.retrieval import evaluate_retrieval
from atomas.training.engine import GradientNorm, set_learning_rate
from atomas.training.run_directory import StopSignal
from atomas.training.schedule import learning_rate
from atomas.training.session import Session
from atomas.training.telemetry import MetricsFile, Progress, logger, peak_memory_mb

RESUME_EXIT_CODE = 75
"""EX_TEMPFAIL: the run was asked to stop, has saved, and wants to be started again."""


def train(config: Config) -> int:
    """Train until `training.max_steps`, continuing the run's newest checkpoint where there is one.

    Returns:
        The exit code: 0 when the last step is done, RESUME_EXIT_CODE after a stop that was asked for.
    """
    with StopSignal() as stop, process_group(config.run) as (placement, device):
        session = Session.open(config, placement, device)
        metrics = MetricsFile(session.run.attempt_path / "metrics.jsonl", enabled=placement.rank == 0)
        progress = Progress(
            start=session.step,
            total=config.training.max_steps,
            every=config.training.log_every,
            enabled=placement.rank == 0,
        )
        try:
            return _run_steps(session, stop, metrics, progress)
        finally:
            progress.close()
            metrics.close()


def _run_steps(session: Session, stop: StopSignal, metrics: MetricsFile, progress: Progress) -> int:
    config, run, device = session.config, session.run, session.device
    total = config.training.max_steps
    if session.step >= total:
        logger.info("step %d of %d is done: nothing left to do", session.step, total)
        return 0
    if any_rank(session.placement.rank == 0 and run.kill_requested(), device):
        logger.warning("%s exists: remove it to go on", run.path / "KILL")
        return RESUME_EXIT_CODE
    batches = iter(session.batches())
    session.engine.train()
    while session.step < total:
        record = _train_step(session, batches)
        session.step += 1
        metrics.write("train", session.step, record)
        progress.step(session.step, {"loss": record["loss"], "pairs/s": record["pairs_per_second"]})

        last = session.step == total
        improved = False
        if config.evaluation.every and (last or session.step % config.evaluation.every == 0):
            improved = _evaluate(session, metrics)
        # Votes, so that no rank saves or stops alone: a signal may reach only one of them.
        is_rank_zero = session.placement.rank == 0
        stopping = any_rank(stop.received is not None or (is_rank_zero and run.kill_requested()), device)
        asked_to_save = any_rank(is_rank_zero and run.take_save_request(), device)
        due = config.checkpoint.every > 0 and session.step % config.checkpoint.every == 0
        if last or due or improved or stopping or asked_to_save:
            session.save(is_best=improved)
        if stopping and not last:
            logger.warning(
                "stopped after step %d and saved: start the same command again to continue", session.step
            )
            return RESUME_EXIT_CODE
    return 0


def _train_step(session: Session, batches: Iterator[PairBatch]) -> dict[str, float]:
    """One optimizer step over `gradient_accumulation_steps` contrastive batches; returns what is logged."""
    config, engine, momentum, device = session.config, session.engine, session.momentum, session.device
    started = time.perf_counter()
    rate = learning_rate(config, session.step)
    set_learning_rate(engine, rate)
    session.update_momentum()
    accumulation = config.training.gradient_accumulation_steps
    means: dict[str, float] = {}
    tokens = data_wait = 0.0
    norm = GradientNorm(engine)
    for _ in range(accumulation):
        waited = time.perf_counter()
        batch = next(batches).to(device)
        data_wait += time.perf_counter() - waited
        with session.autocast():
            targets = None if momentum is None else momentum.targets(batch)
            losses = engine(batch, targets)
        engine.backward(losses["loss"])
        if momentum is not None and targets is not None:
            momentum.enqueue(batch, targets)
        norm.before_step()
        engine.step()  # steps the optimizer at the last batch of the accumulation
        tokens += batch.text.ids.numel() + batch.smiles.ids.numel()
        for name, value in losses.items():
            means[name] = means.get(name, 0.0) + float(value.detach()) / accumulation
    means["tokens"] = tokens
    means["data_wait_seconds"] = data_wait
    means["peak_memory_mb"] = peak_memory_mb(device)
    means = mean_over_ranks(means, device)
    seconds = time.perf_counter() - started
    tokens = means.pop("tokens") * session.placement.world_size
    return {
        **means,
        "learning_rate": rate,
        "gradient_norm": norm.value(),
        "samples": (session.step + 1) * accumulation * config.data.batch_size,
        "step_seconds": seconds,
        "pairs_per_second": accumulation * config.data.batch_size / seconds,
        "tokens_per_second": tokens / seconds,
    }


def _evaluate(session: Session, metrics: MetricsFile) -> bool:
    """Retrieval on the validation split; True if it is the best so far. Collective."""
    session.engine.eval()
    with session.autocast():
        result = evaluate_retrieval(session.engine.module, session.validation_batches(), session.device)
    session.engine.train()
    values = {
        f"{direction}/{name}": value
        for direction, direction_metrics in result.metrics["global"].items()
        for name, value in direction_metrics.as_dict().items()
    }
    metrics.write("validation", session.step, values)
    logger.info("step %d validation: %s", session.step, result.summary("global"))
    score = result.mean_reciprocal_rank("global")
    improved = score > session.best_score
    session.best_score = max(score, session.best_score)
    return improved
