"""`atomas bench step`: every provider in turn, round after round; its report is on disk after every one of them."""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from atomas.benchmarks.step.presets import PRESETS, Preset
from atomas.errors import AtomasError

if TYPE_CHECKING:
    from atomas.benchmarks.step.measurement import Job, Measurement
    from atomas.benchmarks.step.pairs import PairSource, TokenPair
    from atomas.config import Config

DESCRIPTION = (
    "Time whole training steps: ours, ours with one thing switched off (without:NAME) or with an option of a run\n"
    "(with:NAME), the published form, and the way from it to ours switch by switch (path:NAME). Each provider runs\n"
    "in a process of its own, so that its peak memory is its own. Before anything is timed ours and the published\n"
    "form must have the same losses and gradients on sequences of full length. --ranks measures weak scaling of\n"
    "ours instead."
)
EXAMPLE = "--preset cpu-small --batch 8 --json docs/results/step/cpu-small.json"
GROUPS = ("published", "ours", "ablations", "options", "path")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="cpu-small", help="default: cpu-small")
    add("--batch", type=_positive, default=8, metavar="B", help="pairs of a step, on each rank (default: 8)")
    add("--json", type=Path, metavar="FILE", required=True, help="the report, written after every provider")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: CUDA where there is one")
    add(
        "--threads",
        type=_positive,
        metavar="N",
        help="CPU threads of a process (default: its share of the cores)",
    )
    add(
        "--providers",
        nargs="+",
        default=list(GROUPS),
        metavar="NAME",
        help=f"providers, or of the groups {', '.join(GROUPS)} (default: all)",
    )
    add("--ranks", nargs="+", type=_positive, metavar="W", help="weak scaling of ours over so many processes")
    add("--steps", type=_positive, default=8, metavar="N", help="timed steps in a round (default: 8)")
    add("--warm-up", type=_positive, default=2, metavar="N", help="steps before them (default: 2)")
    add("--rounds", type=_positive, default=2, metavar="N", help="times that all take turns (default: 2)")
    add("--seconds", type=float, default=60.0, metavar="S", help="of a provider in a round (default: 60)")
    add("--dropout", type=float, default=0.1, help="of the backbone (default: 0.1)")
    add(
        "--data",
        type=Path,
        metavar="FILE",
        help="pairs (default: ChEBI-20 in $ATOMAS_SHARED, else generated)",
    )
    add(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="default: T5's in $ATOMAS_SHARED, else trained on the pairs",
    )
    add("--memory-limit", type=float, metavar="GIB", help="of a process on the CPU (default: what is free)")
    add("--seed", type=int, default=0, help="of the drawn pairs (default: 0)")


def run(options: argparse.Namespace) -> None:
    """Measure what the options ask for. AtomasError for a user's mistake, or where the losses differ."""
    import torch

    from atomas.benchmarks.step.measurement import measure
    from atomas.benchmarks.step.pairs import draw_batches
    from atomas.benchmarks.step.same_loss import check_same_loss
    from atomas_kernels.bench import report as kernels_report

    device = torch.device(_device(options.device))
    preset = PRESETS[options.preset]
    if options.threads is None:
        options.threads = max(1, len(os.sched_getaffinity(0)) // max(options.ranks or [1]))
    config = preset.config(
        batch_size=options.batch, device=device.type, dropout=options.dropout, threads=options.threads
    )
    providers = ["ours"] if options.ranks else _providers(options.providers, config)
    source = _source(options)
    pairs = source.read(longest=preset.length, vocabulary=preset.vocabulary)
    torch.set_num_threads(options.threads)
    head = kernels_report.head(device, ("transformers", "deepspeed")) | {
        "benchmark": "step",
        "preset": options.preset,
        "sizes": asdict(preset),
        "pairs": source.description,
        "length_distribution": None,
        "dropout": options.dropout,
        "dirty": _dirty(),
    }
    try:
        result = kernels_report.Report(options.json, head)
    except ValueError as error:
        raise AtomasError(str(error)) from error
    _say("same losses at full length")
    same = check_same_loss(config, preset, device)
    result.content["same_loss"] = asdict(same) | {"deviation": same.deviation}
    peaks = {config.training.precision: _peak(device, config.training.precision)}
    result.content["peak_flops"] = peaks[config.training.precision]
    steps = options.warm_up + options.steps
    for world_size in options.ranks or [1]:
        batches = draw_batches(pairs, size=options.batch * world_size, count=steps, seed=options.seed)
        jobs = [_job(name, options, preset, device.type, world_size, batches) for name in providers]
        for precision in {job.config.training.precision for job in jobs} - set(peaks):
            peaks[precision] = _peak(device, precision)
        found: dict[str, list[list[Measurement]]] = {name: [] for name in providers}
        first = len(result.content["rows"])
        for turn in range(options.rounds):
            for job in jobs:
                if turn and found[job.provider][0][0].status != "ok":
                    continue
                _say(f"round {turn + 1} of {options.rounds}: {job.provider}, {world_size} rank(s)")
                found[job.provider].append(measure(job))
                rows = [
                    _row(job, found[job.provider], peaks[job.config.training.precision]["per_second"])
                    for job in jobs
                    if found[job.provider]
                ]
                result.content["rows"][first:] = rows[:-1]
                result.add(rows[-1])
                _say("    " + _summary(next(row for row in rows if row["provider"] == job.provider)))
    print(options.json)


def _providers(wanted: list[str], config: "Config") -> list[str]:
    from atomas.benchmarks.step.switches import ablation_providers, option_providers, path_providers

    groups = {
        "published": ["published"],
        "ours": ["ours"],
        "ablations": ablation_providers(),
        "options": option_providers(config),
        "path": path_providers(),
    }
    known = list(dict.fromkeys(name for names in groups.values() for name in names))
    chosen: dict[str, None] = {}
    for name in wanted:
        if name not in groups and name not in known:
            there = ", ".join(dict.fromkeys([*groups, *known]))
            raise AtomasError(f"--providers: no {name!r}; there are {there}")
        chosen |= dict.fromkeys(groups.get(name, [name]))
    return list(chosen)


def _source(options: argparse.Namespace) -> "PairSource":
    from atomas.benchmarks.step.pairs import PairSource

    shared = Path(os.environ.get("ATOMAS_SHARED", "")) / "data"
    file, tokenizer = options.data, options.tokenizer
    real = shared / "chebi20" / "validation.txt"
    if file is None and os.environ.get("ATOMAS_SHARED") and real.is_file():
        file = real
    t5 = shared / "tokenizers" / "t5"
    if tokenizer is None and os.environ.get("ATOMAS_SHARED") and t5.is_dir():
        tokenizer = t5
    return PairSource(file=file, tokenizer=tokenizer)


def _job(
    provider: str,
    options: argparse.Namespace,
    preset: Preset,
    device: str,
    world_size: int,
    batches: "list[list[TokenPair]]",
) -> "Job":
    import torch

    from atomas.benchmarks.step.measurement import Job
    from atomas.benchmarks.step.switches import configured
    from atomas_kernels.bench import memory

    config = preset.config(
        batch_size=options.batch * world_size,
        device=device,
        dropout=options.dropout,
        threads=options.threads,
        world_size=world_size,
    )
    free = memory.available(torch.device("cpu")) // world_size
    return Job(
        provider=provider,
        preset=preset,
        config=configured(provider, config),
        batches=batches,
        warm_up=options.warm_up,
        seconds=options.seconds,
        memory_limit=int(options.memory_limit * memory.GIB) if options.memory_limit else free,
        world_size=world_size,
    )


def _row(job: "Job", rounds: "list[list[Measurement]]", peak_flops: float) -> dict[str, Any]:
    """What all rounds of one provider found; of several ranks, rank 0 tells the time and the others their part."""
    from atomas.benchmarks.step.switches import description, switched_off

    first = rounds[0]
    failed = next((each for each in first if each.status != "ok"), None)
    row: dict[str, Any] = {
        "provider": job.provider,
        "off": [] if job.provider == "published" else list(switched_off(job.provider)),
        "batch": job.config.data.batch_size // job.world_size,
        "ranks": job.world_size,
        "device": job.config.run.device,
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[job.config.training.precision],
        "threads": job.config.run.threads,
        "status": failed.status if failed else "ok",
        "reason": failed.reason if failed else None,
        "step_seconds": None,
        "cpu_seconds": None,
        "pairs_per_s": None,
        "tokens_per_s": None,
        "mfu": None,
        "peak_mb": None,
        "base_mb": first[0].base_mb,
        "losses": first[0].losses,
        "lengths": _lengths(job),
        "peak_flops": peak_flops,
        "description": description(job.provider),
    }
    seconds = [value for measured in rounds for value in measured[0].seconds]
    if failed or not seconds:
        return row
    cpu = [value for measured in rounds for each in measured for value in each.cpu_seconds]
    phases = [phase for measured in rounds for phase in measured[0].phases]
    middle = median(seconds)
    pairs = job.config.data.batch_size
    tokens = _tokens(job) / len(job.batches)
    return row | {
        "step_seconds": _quantiles(seconds),
        "cpu_seconds": _quantiles(cpu),
        "steps": len(seconds),
        "pairs_per_s": pairs / middle,
        "tokens_per_s": tokens / middle,
        "mfu": _flops(job) / len(job.batches) / middle / (peak_flops * job.world_size),
        "peak_mb": max(each.peak_mb or 0.0 for measured in rounds for each in measured),
        "phases": {key: median(phase[key] for phase in phases) for key in phases[0]},
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    import torch

    wanted = torch.tensor([0.0, 0.2, 0.5, 0.8], dtype=torch.float64)
    found = torch.tensor(values, dtype=torch.float64).quantile(wanted).tolist()
    return dict(zip(("min", "p20", "p50", "p80"), (round(value, 5) for value in found), strict=True))


def _lengths(job: "Job") -> dict[str, list[int]]:
    """Tokens of each batch."""
    return {
        "text": [sum(len(pair.text) for pair in batch) for batch in job.batches],
        "smiles": [sum(len(pair.smiles) for pair in batch) for batch in job.batches],
    }


def _tokens(job: "Job") -> int:
    return sum(sum(side) for side in _lengths(job).values())


def _flops(job: "Job") -> float:
    """What loss and gradient of all batches need, on real tokens, whoever computes them."""
    from atomas.model.flops import BackboneSizes, count_step_flops

    sizes = BackboneSizes.of_model(job.config.model, job.preset.vocabulary)
    return float(
        sum(
            count_step_flops(
                job.config,
                sizes,
                [len(pair.text) for pair in batch],
                [len(pair.smiles) for pair in batch],
                queue=job.preset.queue,
            ).model
            for batch in job.batches
        )
    )


def _peak(device: Any, precision: str) -> dict[str, Any]:
    """FLOP/s of the device, the denominator of MFU."""
    from atomas.training.peak_flops import peak_flops

    found = peak_flops(device, precision)
    return {"per_second": found.per_second, "source": found.source}


def _device(wanted: str) -> str:
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise AtomasError("--device: torch sees no CUDA GPU; take --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def _dirty() -> bool:
    """Whether code that is measured differs from the commit."""
    from atomas_kernels.bench.report import _git

    folders = (":/atomas", ":/kernels", ":/csrc")
    return bool(_git("status", "--porcelain", "--untracked-files=no", "--", *folders))


def _summary(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason']}"
    return (
        f"{row['step_seconds']['p50']:.2f} s a step ({row['cpu_seconds']['p50']:.2f} s on cores), "
        f"{row['pairs_per_s']:.2f} pairs/s, {row['peak_mb']:.0f} MiB"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
