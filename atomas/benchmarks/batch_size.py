"""`atomas bench batch-size`: peak memory of a step against the contrastive batch, with gradient caching and without."""

import argparse
import multiprocessing
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DESCRIPTION = (
    "Run one training step of a small model for each contrastive batch B, in a process of its own: once with all B\n"
    "pairs encoded at once, and once in micro-batches (gradient caching), whose memory B must not change. Pairs are\n"
    "random tokens. Both ways have the same loss and gradient norm, which is asserted where both ran."
)
EXAMPLE = "--batch 64 256 1024 4096 --micro-batch 32 --json docs/results/distributed/batch_size.json"
TEXT_LENGTHS, SMILES_LENGTHS = (16, 40), (8, 28)
"""Tokens of a pair, drawn evenly."""
TOLERANCE = 1e-4
"""Relative, between the two ways; float32."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one process found."""

    batch: int
    micro_batch: int
    """Pairs encoded at once; the batch where nothing is cached"""
    cache: str
    loss: float
    gradient_norm: float
    peak_mb: float
    """Most memory during the step beyond what was held before it, MiB"""
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add(
        "--batch",
        type=int,
        nargs="+",
        default=[64, 256, 1024, 4096],
        metavar="B",
        help="default: 64 ... 4096",
    )
    add("--micro-batch", type=int, default=32, metavar="N", help="pairs encoded at once (default: 32)")
    add(
        "--cache",
        choices=("device", "host", "disk"),
        default="disk",
        help="where features wait (default: disk)",
    )
    add(
        "--whole-up-to",
        type=int,
        default=1024,
        metavar="B",
        help="largest B also run at once (default: 1024)",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--json", type=Path, metavar="FILE", required=True, help="the report, written after every row")


def run(options: argparse.Namespace) -> None:
    """Measure and write the report; AtomasError where the two ways differ."""
    import torch

    from atomas.errors import AtomasError
    from atomas_kernels.bench import report as kernels_report

    head = kernels_report.head(torch.device(options.device), ("transformers", "deepspeed")) | {
        "benchmark": "batch-size",
        "text_lengths": TEXT_LENGTHS,
        "smiles_lengths": SMILES_LENGTHS,
        "length_distribution": None,
    }
    try:
        report = kernels_report.Report(options.json, head)
    except ValueError as error:
        raise AtomasError(str(error)) from error
    rows: list[Row] = []
    context = multiprocessing.get_context("spawn")
    for batch in options.batch:
        ways = [options.micro_batch, *([batch] if batch <= options.whole_up_to else [])]
        for micro_batch in ways:
            with context.Pool(1) as pool:
                rows.append(pool.apply(measure, (batch, micro_batch, options.cache, options.device)))
            print(f"B = {batch}, {micro_batch} at once: {rows[-1].peak_mb:.0f} MiB, {rows[-1].seconds:.1f} s")
            report.add(asdict(rows[-1]))
        for value in ("loss", "gradient_norm"):
            found = [getattr(row, value) for row in rows[-len(ways) :]]
            if max(found) - min(found) > TOLERANCE * abs(found[0]):
                raise AtomasError(f"B = {batch}: {value} is {found[0]} in micro-batches, {found[-1]} at once")
    print(options.json)


def measure(batch: int, micro_batch: int, cache: Any, device_name: Any) -> Row:
    """One step, after one with a single micro-batch that makes what every step needs."""
    import torch

    from atomas.config import (
        Config,
        DataConfig,
        DeepSpeedConfig,
        LossConfig,
        ModelConfig,
        MomentumConfig,
        OptimizerConfig,
        RunConfig,
        TrainingConfig,
    )
    from atomas.distributed.process_group import process_group
    from atomas.model.momentum_encoder import Momentum
    from atomas.training.engine import OptimizerStep, build_engine
    from atomas.training.model_files import build_model
    from atomas.training.step import contrastive_step
    from atomas_kernels.bench import memory

    config = Config(
        run=RunConfig(device=device_name, threads=1),
        data=DataConfig(batch_size=batch, token_budget=4096),
        model=ModelConfig(d_model=64, d_kv=16, d_ff=256, num_layers=2, num_decoder_layers=2, num_heads=4),
        loss=LossConfig(),
        momentum=MomentumConfig(queue_size=1024),
        optimizer=OptimizerConfig(gradient_clipping=0.0),
        training=TrainingConfig(micro_batch_size=micro_batch),
        deepspeed=DeepSpeedConfig(zero_stage=0),
    )
    with process_group(config.run) as (_, device):
        torch.manual_seed(0)
        model = build_model(config, 2048).to(device).eval()  # dropout would differ between the two ways
        momentum = Momentum(model.encoder, config.momentum).to(device)
        engine = build_engine(config, model, 1)
        engine.eval()
        pairs = random_pairs(batch).to(device)
        warm = random_pairs(min(32, batch)).to(device)
        for _ in range(batch // micro_batch):  # as many passes as the engine accumulates
            contrastive_step(engine, None, warm)
            engine.step()
        optimizer_step = OptimizerStep(engine)
        started = time.perf_counter()
        with memory.peak(device) as found:
            losses = contrastive_step(
                engine, momentum, pairs, micro_batches=batch // micro_batch, cache=cache
            )
            optimizer_step.take()
        return Row(
            batch=batch,
            micro_batch=micro_batch,
            cache=cache if micro_batch < batch else "none",
            loss=float(losses["loss"]),
            gradient_norm=optimizer_step.norm,
            peak_mb=(found.bytes or 0) / 2**20,
            seconds=time.perf_counter() - started,
        )


def random_pairs(count: int) -> Any:
    """A batch of random tokens; the same for the same `count`."""
    import torch

    from atomas.data.batching import PairBatch, RaggedTokens

    generator = torch.Generator().manual_seed(count)

    def tokens(shortest: int, longest: int) -> RaggedTokens:
        lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
        ids = torch.randint(3, 2048, (int(lengths.sum()),), generator=generator)
        ids[lengths.cumsum(0) - 1] = 1
        return RaggedTokens(ids=ids, lengths=lengths)

    numbers = torch.arange(count)
    return PairBatch(
        text=tokens(*TEXT_LENGTHS),
        smiles=tokens(*SMILES_LENGTHS),
        molecule_id=numbers,
        text_id=numbers,
        sample_id=numbers,
    )
