"""Everything a running training process holds: assembled, saved and restored here; stepped in `loop`."""

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from atomas.config import CheckpointConfig, Config
from atomas.data.bad_samples import FILE_NAME as BAD_SAMPLES
from atomas.data.bad_samples import Skipped, append_skipped
from atomas.data.batching import PairBatch
from atomas.data.corpora import Corpora
from atomas.data.loader import OrderedLoader
from atomas.data.stream import PairStream, build_loader, evaluation_batches
from atomas.data.tokenizer import AtomasTokenizer, resolve_tokenizer
from atomas.distributed.agreement import from_all_ranks, from_rank_zero, together
from atomas.errors import AtomasError
from atomas.json_files import write_json
from atomas.model.momentum_encoder import Momentum
from atomas.training.checkpoint import newest_good_checkpoint, step_of
from atomas.training.data_position import BatchNumbers, DataPosition, Range
from atomas.training.engine import build_engine, check_batch
from atomas.training.model_files import build_model
from atomas.training.run_directory import RunDirectory
from atomas.training.saver import Saver
from atomas.training.shards import OptimizerShard
from atomas.training.snapshot import (
    HostCopies,
    Snapshot,
    check_identity,
    identity,
    read_trainer,
    restore,
    saved_in_doubt,
    seed_dropout,
)
from atomas.training.stability import BAD_STEPS, NumericalTroubleError, Stability
from atomas.training.step import micro_batches_of
from atomas.training.telemetry import environment, logger, start_logging
from atomas_kernels import active_backends, set_backend
from atomas_launcher.placement import Placement


@dataclass(kw_only=True)
class Session:
    """One rank of a run."""

    config: Config
    placement: Placement
    device: torch.device
    run: RunDirectory
    corpora: Corpora
    tokenizer: AtomasTokenizer
    stream: PairStream
    engine: Any
    shard: OptimizerShard
    momentum: Momentum | None
    saver: Saver
    stability: Stability
    position: DataPosition = field(default_factory=DataPosition)
    step: int = 0
    """Optimizer steps done; `position` says which data the next one takes."""
    skipped: int = 0
    """Samples of all ranks that could not be read so far."""

    @classmethod
    def open(cls, config: Config, placement: Placement, device: torch.device) -> "Session":
        """Assemble a run and continue its newest good checkpoint, if it has one. Collective.

        Raises:
            AtomasError: whatever a user can mend: the corpus, the tokenizer, the world size, a checkpoint.
        """
        check_batch(config, placement.world_size)
        _set_kernels(config.run.kernels)
        run = _open_run(config, placement, device)
        with together("writing to the run folder"):
            if placement.rank == 0:
                write_json(run.attempt_path / "env.json", environment(device, placement.world_size))
                used = ", ".join(f"{op}: {name}" for op, name in active_backends(device).items())
                logger.info("operators on %s: %s", device, used)
        corpora = Corpora.open(config)
        if config.evaluation.every:
            corpora.first_with(
                config.data.validation_split
            )  # a missing split is said now, not at the first evaluation
        opened = None
        with together("preparing tokenizer and token lengths"):
            if placement.rank == 0:  # the others then find both in the run's folder
                opened = _open_stream(config, corpora, run, placement)
        with together("opening tokenizer and token lengths, and building the model"):
            tokenizer, stream = opened or _open_stream(config, corpora, run, placement)
            torch.manual_seed(config.run.seed)  # the same weights on every rank
            model = build_model(config, tokenizer.vocab_size).to(device)
        if config.training.compile:
            model.encoder.backbone.compile_blocks()
        momentum = None
        if config.momentum.enabled and config.loss.global_weight:
            autocast = torch.bfloat16 if config.training.precision.startswith("bf16") else None
            momentum = Momentum(model.encoder, config.momentum, autocast=autocast).to(device)
        engine = build_engine(config, model, placement.world_size)
        shard = OptimizerShard(engine)
        if momentum is not None:
            momentum.shard(
                shard.fragments,
                shard.masters_by_part(),
                replicated=shard.replicated,
                layerwise=config.momentum.forward == "layerwise",
            )
        seed_dropout(config.run.seed, 0, placement.rank)
        session = cls(
            config=config,
            placement=placement,
            device=device,
            run=run,
            corpora=corpora,
            tokenizer=tokenizer,
            stream=stream,
            engine=engine,
            shard=shard,
            momentum=momentum,
            saver=Saver(run, _checkpoint_config(config, shard), device),
            stability=Stability(config.stability),
        )
        session._resume()
        with together("writing to the run folder"):
            if placement.rank == 0:
                write_json(run.attempt_path / "deepspeed.json", engine.config)
                run.write_config(config)
        return session

    def batches(self) -> OrderedLoader[PairBatch]:
        """This rank's batches from the present position to the end of the run."""
        accumulation = self.config.training.gradient_accumulation_steps
        numbers = BatchNumbers(self.position, self.step, self.config.training.max_steps, accumulation)
        return build_loader(
            self.stream,
            numbers,
            num_workers=self.config.data.num_workers,
            pin_memory=self.device.type == "cuda",
        )

    def note_skipped(self, own: Sequence[Skipped], count: int) -> None:
        """Write down this rank's samples of the last step that could not be read, `count` on all. Collective.

        Raises AtomasError, on every rank, where the run has skipped more than it may.
        """
        if not count:
            return
        self.skipped += count
        of_ranks = from_all_ranks(list(own))
        with together("writing down bad samples"):
            if self.placement.rank == 0:
                append_skipped(self.run.path, self.step, [one for rank in of_ranks for one in rank])
                logger.warning(
                    "step %d: %d samples could not be read: %s", self.step, count, self.run.path / BAD_SAMPLES
                )
        self.stream.policy.check_total(self.skipped, self.run.path)

    def validation_batches(self) -> Iterable[tuple[PairBatch, int]]:
        """This rank's share of the validation pairs, in passes of its own training batch size."""
        config, placement = self.config, self.placement
        return evaluation_batches(
            self.corpora.first_with(config.data.validation_split),
            self.tokenizer,
            batch_size=config.data.batch_size // placement.world_size,
            rank=placement.rank,
            world_size=placement.world_size,
            max_pairs=config.evaluation.max_pairs,
            max_text_tokens=config.data.max_text_tokens,
            max_smiles_tokens=config.longest_smiles,
        )

    @property
    def micro_batches(self) -> int:
        """Passes into which this rank's pairs of a contrastive batch are cut."""
        return micro_batches_of(self.config, self.placement.world_size)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision over fp32 weights, where the configuration asks for it."""
        enabled = self.config.training.precision == "bf16_autocast"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def update_momentum(self) -> None:
        """theta_m follows the fp32 weights that the last step left. Collective where those are sharded."""
        if self.momentum is not None:
            self.momentum.update(self.shard.masters_by_part())

    def close(self) -> None:
        """Remove what the run keeps on disks of the node. The engine is of no use after it."""
        if hasattr(self.engine, "swap_folder"):
            self.engine.swap_folder.remove()

    def save(self, *, score: float | None = None, wait: bool = False) -> None:
        """Begin a checkpoint of the present step; see `Saver.begin`. Collective."""
        self.saver.begin(self._snapshot, self.step, score=score, wait=wait)

    def _snapshot(self, copies: HostCopies | None) -> Snapshot:
        accumulation = self.config.training.gradient_accumulation_steps
        trainer = {
            "step": self.step,
            "samples": self.step * accumulation * self.config.data.batch_size,
            "best_score": self.saver.best_score,
            "world_size": self.placement.world_size,
            "loss_scale": self.shard.scale(),
            "queue": None if self.momentum is None else self.momentum.queue.get_extra_state(),
            "stability": self.stability.state(),
            "in_doubt": self.stability.in_doubt,
            "skipped": self.skipped,
            "data_left_out": self.position.left_out,
            "identity": identity(self),
        }
        return Snapshot.take(self, trainer, copies)

    def _resume(self) -> None:
        latest = self.run.name_in("LATEST")
        checkpoint = newest_good_checkpoint(self.run.checkpoints, latest, logger.error)
        if checkpoint is None:
            logger.info("starting from step 0 in %s", self.run.path)
            return
        if self.config.checkpoint.resume == "never":
            raise AtomasError(
                f"run {self.run.path} already has {checkpoint.name} and checkpoint.resume = 'never'; "
                "choose another run.name or resume = 'auto'"
            )
        trainer = read_trainer(checkpoint)
        check_identity(trainer["identity"], identity(self), checkpoint)
        left_out = []
        with together("reading which data is left out"):
            if self.placement.rank == 0:
                left_out = self.run.data_left_out()
        self._go_to(checkpoint, trainer, known_left_out=from_rank_zero(left_out))
        logger.info("continuing %s at step %d", checkpoint, self.step)

    def roll_back(self, reason: str) -> None:
        """Return to the newest checkpoint from before the trouble, and on without the data since then. Collective.

        Raises:
            NumericalTroubleError: the run may not go back, or has nothing to go back to.
        """
        self.saver.finish(must_succeed=False)  # what is on its way is of before the trouble
        limit = self.config.stability.rollbacks
        if len(self.position.left_out) >= limit:
            used = f" after {limit} rollbacks" if limit else ""
            raise NumericalTroubleError(
                f"{reason}{used}; the batches are in {self.run.attempt_path / BAD_STEPS}"
            )
        checkpoint = newest_good_checkpoint(self.run.checkpoints, None, logger.error, in_doubt=saved_in_doubt)
        if checkpoint is None:
            raise NumericalTroubleError(f"{reason}, and there is no checkpoint yet to go back to")
        position = self.position.without(step_of(checkpoint), self.step)
        with together("leaving data out"):  # first of all: a restart must know it too
            if self.placement.rank == 0:
                self.run.leave_data_out(position.left_out)
        log = logger.error if self.placement.rank == 0 else logger.info  # on the console once
        log("%s: back to %s, and on without the data of the steps since then", reason, checkpoint.name)
        self._go_to(checkpoint, read_trainer(checkpoint), known_left_out=position.left_out)

    def _go_to(self, checkpoint: Path, trainer: dict[str, Any], *, known_left_out: Sequence[Range]) -> None:
        with together(f"reading {checkpoint.name}"):
            restore(self, checkpoint, trainer)
        self.step, self.saver.best_score = trainer["step"], trainer["best_score"]
        self.skipped = trainer["skipped"]
        self.stability.set_state(trainer["stability"])
        self.position = DataPosition([*trainer["data_left_out"], *known_left_out])
        self.shard.give_weights()
        if self.momentum is not None:
            self.momentum.refresh()


def _checkpoint_config(config: Config, shard: OptimizerShard) -> CheckpointConfig:
    if not shard.swapped:
        return config.checkpoint
    # copies in memory of what lies on NVMe would not fit there
    return dataclasses.replace(config.checkpoint, asynchronous=False)


def _open_stream(
    config: Config, corpora: Corpora, run: RunDirectory, placement: Placement
) -> tuple[AtomasTokenizer, PairStream]:
    tokenizer = resolve_tokenizer(
        config.tokenizer,
        corpora,
        run.path,
        split=config.data.train_split,
        skip_bad_blocks=config.data.on_error == "skip",
    )
    stream = PairStream.open(config, corpora, tokenizer, rank=placement.rank, world_size=placement.world_size)
    return tokenizer, stream


def _open_run(config: Config, placement: Placement, device: torch.device) -> RunDirectory:
    run = None
    with together("opening the run folder"):
        if placement.rank == 0:
            run = RunDirectory.open(config, is_rank_zero=True)
    attempt = from_rank_zero(None if run is None else run.attempt)
    run = run or RunDirectory.open(config, is_rank_zero=False, attempt=attempt)
    start_logging(run.attempt_path / f"rank_{placement.rank:04d}.log", placement.rank)
    return run


def _set_kernels(backend: str) -> None:
    try:
        set_backend(backend)
    except (ValueError, RuntimeError) as error:
        raise AtomasError(f"run.kernels = {backend!r}: {error}") from None
