"""Memory, bytes and seconds of both forms of the momentum copy under ZeRO stage 3, on two gloo ranks.

    python -m atomas.benchmarks.momentum_forward --json docs/results/momentum_forward.json

A replica on every rank is refreshed after each update; pieces are gathered layer by layer while they run. Every form
runs in processes of its own. Seconds are of a CPU, with whatever else it was doing: read them as a ratio.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from atomas.config import Config, DataConfig, DeepSpeedConfig, ModelConfig, MomentumConfig, TrainingConfig
from atomas.data.batching import PairBatch, RaggedTokens
from atomas.model.momentum_encoder import Momentum
from atomas.phases import Collective, Observer, observed_by
from atomas.training.engine import build_engine
from atomas.training.model_files import build_model
from atomas.training.shards import OptimizerShard

WORLD = 2
STEPS = 5
VOCABULARY = 4000
PAIRS, TEXT_TOKENS, SMILES_TOKENS = 8, 32, 24


def main() -> None:
    """Measure both forms and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="the report")
    out = parser.parse_args().json
    out.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "benchmark": "momentum-forward",
        "ranks": WORLD,
        "steps": STEPS,
        "pairs": PAIRS,
        "text_tokens": TEXT_TOKENS,
        "smiles_tokens": SMILES_TOKENS,
        "torch": torch.__version__,
        "rows": [],
    }
    for precision in ("fp32", "bf16"):
        for forward in ("replica", "layerwise"):
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(_measure, args=(folder, precision, forward), nprocs=WORLD)
                row = json.loads((Path(folder) / "row.json").read_text(encoding="utf-8"))
            print(json.dumps(row), flush=True)
            report["rows"].append(row)
            out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


class _Sent(Observer):
    """Bytes that this rank puts into collectives."""

    def __init__(self) -> None:
        self.bytes = 0

    def collective(self, call: Collective) -> None:
        self.bytes += call.payload_bytes if call.what == "momentum weights" else 0


@contextmanager
def _gathers_counted(sent: _Sent) -> Iterator[None]:
    """DeepSpeed's gathers of weights do not go through our collectives."""
    from deepspeed.runtime.zero import partition_parameters

    gather = partition_parameters._dist_allgather_fn

    def counted(piece: torch.Tensor, *rest: Any, **options: Any) -> Any:
        sent.bytes += piece.nbytes
        return gather(piece, *rest, **options)

    partition_parameters._dist_allgather_fn = counted
    try:
        yield
    finally:
        partition_parameters._dist_allgather_fn = gather


def _measure(rank: int, folder: str, precision: Any, forward: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank), LOCAL_SIZE=str(WORLD))
    os.environ.update(DS_ACCELERATOR="cpu")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    config = Config(
        data=DataConfig(batch_size=PAIRS),
        model=ModelConfig(d_model=256, d_kv=64, d_ff=1024, num_layers=6, num_decoder_layers=6, num_heads=4),
        momentum=MomentumConfig(queue_size=0, forward=forward),
        training=TrainingConfig(precision=precision),
        deepspeed=DeepSpeedConfig(zero_stage=3),
    )
    torch.manual_seed(0)
    model = build_model(config, VOCABULARY)
    parameters = sum(p.numel() for p in model.encoder.parameters())
    momentum = Momentum(
        model.encoder, config.momentum, autocast=torch.bfloat16 if precision == "bf16" else None
    )
    shard = OptimizerShard(build_engine(config, model, WORLD))
    momentum.shard(
        shard.fragments, shard.masters_by_part(), replicated=False, layerwise=forward == "layerwise"
    )
    batch = _batch(rank)
    sent, updates, forwards = _Sent(), [], []
    with observed_by(sent), _gathers_counted(sent):
        for _ in range(STEPS):
            dist.barrier()
            started = time.perf_counter()
            momentum.update(shard.masters_by_part())
            updated = time.perf_counter()
            momentum.targets(batch)
            updates.append(updated - started)
            forwards.append(time.perf_counter() - updated)
    if rank == 0:
        row = {
            "precision": precision,
            "forward": forward,
            "parameters": parameters,
            "held_bytes": _held(momentum),
            "sent_bytes_per_step": sent.bytes / STEPS,
            "update_seconds": statistics.median(updates[1:]),
            "forward_seconds": statistics.median(forwards[1:]),
        }
        (Path(folder) / "row.json").write_text(json.dumps(row), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _held(momentum: Momentum) -> int:
    """Bytes of the masters and of what runs, between steps."""
    running = [getattr(p, "ds_tensor", p) for p in momentum.parameters()]
    storages = {t.untyped_storage() for t in [*running, *momentum.masters.values()]}
    distinct = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(distinct.values())


def _batch(rank: int) -> PairBatch:
    generator = torch.Generator().manual_seed(rank)
    pairs = PAIRS // WORLD

    def tokens(length: int) -> RaggedTokens:
        return RaggedTokens.from_lists(
            torch.randint(3, VOCABULARY, (pairs, length), generator=generator).tolist()
        )

    numbers = torch.arange(pairs) + pairs * rank
    return PairBatch(
        text=tokens(TEXT_TOKENS),
        smiles=tokens(SMILES_TOKENS),
        molecule_id=numbers,
        text_id=numbers,
        sample_id=numbers,
    )


if __name__ == "__main__":
    main()
