"""`atomas bench distributed`: the alignment over ranks, measured on this machine and on paper to 1,024 GPUs."""

import argparse
from dataclasses import asdict
from pathlib import Path

DESCRIPTION = (
    "Work, bytes and time of one rank in the hierarchical alignment, against the number of ranks: ours with both\n"
    "exchanges, the published form that gathers everything, and open_clip's local loss. All must have the same loss.\n"
    "Measured with gloo on processes of this machine; on paper for 1 to 1,024 GPUs."
)
EXAMPLE = "--ranks 1 2 4 --json docs/results/distributed/cpu.json --plot docs/images/distributed.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add(
        "--ranks",
        nargs="+",
        type=_positive,
        default=[1, 2, 4],
        metavar="W",
        help="processes (default: 1 2 4)",
    )
    add("--pairs", type=_positive, default=8, metavar="B", help="pairs of each rank (default: 8)")
    add("--width", type=_positive, default=256, metavar="D", help="width of the states (default: 256)")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="of states and tokens (default: bf16)")
    add("--runs", type=_positive, default=3, metavar="N", help="timed runs; the fastest counts (default: 3)")
    add("--threads", type=_positive, default=1, metavar="N", help="CPU threads of a process (default: 1)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the part on one device")
    add(
        "--as-if", nargs="*", type=_positive, metavar="W",
        help="one device with blocks as if there were so many ranks (default: 8 64 on CUDA, else none)",
    )  # fmt: skip
    add(
        "--paper-pairs",
        type=_positive,
        default=64,
        metavar="B",
        help="pairs of each GPU on paper (default: 64)",
    )
    add("--paper-width", type=_positive, default=768, metavar="D", help="width on paper (default: 768)")
    add("--json", type=Path, metavar="FILE", required=True, help="the report")
    add("--plot", type=Path, metavar="FILE", help="draw it (PNG, SVG or PDF)")


def run(options: argparse.Namespace) -> None:
    """Measure, plan, write and draw."""
    import torch

    from atomas.benchmarks.distributed.forms import FORMS
    from atomas.benchmarks.distributed.measurement import Problem, measure_as_if, measure_ranks
    from atomas.benchmarks.distributed.paper import default_work, paper_rows, planned
    from atomas.json_files import write_json
    from atomas.planning.hardware import GPUS, Assumptions, Cluster
    from atomas.viz.distributed_benchmark import distributed_tables, plot_distributed
    from atomas_kernels.bench import report as kernels_report

    has_cuda = torch.cuda.is_available() and options.device != "cpu"
    device = torch.device("cuda" if has_cuda or options.device == "cuda" else "cpu")
    problem = Problem(
        width=options.width,
        pairs=options.pairs,
        runs=options.runs,
        threads=options.threads,
        precision=options.precision,
    )
    head = kernels_report.head(device, ()) | {"benchmark": "distributed", "problem": asdict(problem)}
    rows = [
        row | planned(row, problem)
        for ranks in sorted(options.ranks)
        for row in measure_ranks(problem, ranks)
    ]
    wanted = options.as_if if options.as_if is not None else [8, 64] * (device.type == "cuda")
    torch.set_num_threads(options.threads)
    on_device = Problem(**asdict(problem) | {"device": device.type})
    assumed = Assumptions()
    cluster = Cluster(gpu=GPUS["h200"], nodes=1, gpus_per_node=8, link_bytes_per_second=50e9)
    work = default_work(options.paper_width, options.paper_pairs, options.precision)
    report = head | {
        "rows": rows,
        "one_device": measure_as_if(on_device, wanted),
        "paper": {
            "gpu": "h200",
            "cluster": asdict(cluster),
            "assumptions": asdict(assumed),
            "pairs": options.paper_pairs,
            "width": options.paper_width,
            "rows": paper_rows(work, FORMS, cluster, assumed),
        },
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.json, report)
    print(distributed_tables(report))
    if options.plot:
        plot_distributed(report, options.plot)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value
