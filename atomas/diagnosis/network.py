"""All ranks of an allocation together: do they meet, add right, and which node is slow. A minute, whatever the size.

Every function is collective: all ranks call it in the same order. Only facts are gathered; `judge` reads them on every
rank alike, so that all end with the same exit code, and can be tested on the facts of a broken cluster.
"""

import dataclasses
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from atomas.config import RunConfig
from atomas.diagnosis.host import check_corpus, check_versions
from atomas.diagnosis.node import node_checks
from atomas.diagnosis.result import CheckResult, attempt, merge
from atomas.distributed.process_group import process_group
from atomas_launcher.placement import find_placement

SMALL_BYTES, LARGE_BYTES = 8, 8 * 2**20
ROUND_TRIPS = 20
SLOW_SHARE = 0.5
"""A node whose links, or a rank whose processor, give less than this share of the median is named."""
CLOCK_SKEW_SECONDS = 1.0
VISIBLE_SECONDS = 30.0
"""How long a file may take to appear on other nodes: network filesystems cache what a folder holds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """Between two ranks, one of each node."""

    first: str
    second: str
    """Names of their nodes."""
    microseconds: float
    """One way, a few bytes."""
    bytes_per_second: float
    """One way, a large message."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What all ranks know after the measurements."""

    nodes: Mapping[str, int]
    """Name of a node -> ranks on it."""
    sums_are_right: Mapping[int, bool]
    """By rank: whether an all-reduce gave the sum."""
    links: Sequence[Link]
    all_reduce_bytes_per_second: float
    """Bus bandwidth over all ranks: 2 (W - 1) / W of the payload over the time."""
    matmul_seconds: Mapping[int, float]
    """By rank: a matrix product of fixed size."""
    clock_offsets: Mapping[str, float]
    """By node: seconds ahead of rank 0's clock."""
    sees_file: Mapping[str, bool]
    """By node: whether a file that rank 0 wrote appeared there with its content."""
    versions: Mapping[str, str]
    """By node: what is installed."""
    corpora: Mapping[str, str]
    """By node: fingerprint of the corpus, or what is wrong with it; empty where none was asked for."""


def check_all_nodes(folder: Path, corpus: Path | str | None) -> tuple[list[CheckResult], bool]:
    """Every node's own checks put together, and what only all can find; the same on each rank. Collective.

    Returns:
        The checks, and whether this is rank 0.

    Raises:
        AtomasError: the ranks do not meet.
    """
    with process_group(RunConfig()) as (placement, device):
        facts = measure(folder, corpus, device)
        found = _gathered(node_checks(folder, corpus) if placement.local_rank == 0 else [])
        of_nodes = zip(facts.nodes, (results for results in found if results), strict=True)
        return [*merge(dict(of_nodes)), *judge(facts)], placement.rank == 0


def measure(folder: Path, corpus: Path | str | None, device: torch.device) -> Facts:
    """All measurements, in one order on every rank. Collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    hosts: list[str] = _gathered(socket.gethostname())
    names = node_names(hosts, _gathered(find_placement().local_rank))
    leaders = [names.index(name) for name in dict.fromkeys(names)]
    one_per_node = leaders if len(leaders) > 1 else list(range(world))
    labels = {r: names[r] if len(leaders) > 1 else f"rank {r}" for r in one_per_node}
    is_right = _sum_is_right(device)
    bandwidth = _all_reduce_bytes_per_second(device)
    pairs = _links(one_per_node, device)
    links = [
        Link(first=labels[a], second=labels[b], microseconds=1e6 * delay, bytes_per_second=speed)
        for part in _gathered(pairs)
        for a, b, delay, speed in part
    ]
    offsets = _clock_offsets(leaders, device)
    sees = _sees_file(folder)
    corpus_fact = check_corpus(corpus).message if corpus and rank in leaders else ""
    of_node = _gathered((sees, check_versions().message, corpus_fact))
    return Facts(
        nodes={name: names.count(name) for name in dict.fromkeys(names)},
        sums_are_right=dict(enumerate(_gathered(is_right))),
        links=links,
        all_reduce_bytes_per_second=bandwidth,
        matmul_seconds=dict(enumerate(_gathered(_matmul_seconds(device)))),
        clock_offsets={names[r]: offset for r, offset in offsets.items()},
        sees_file={names[r]: of_node[r][0] for r in leaders},
        versions={names[r]: of_node[r][1] for r in leaders},
        corpora={names[r]: of_node[r][2] for r in leaders if of_node[r][2]},
    )


def judge(facts: Facts) -> list[CheckResult]:
    """Facts -> checks."""
    return [
        attempt("rendezvous", lambda: _judge_rendezvous(facts)),
        attempt("all-reduce", lambda: _judge_sums(facts)),
        attempt("links", lambda: _judge_links(facts)),
        attempt("processors", lambda: _judge_processors(facts)),
        attempt("clocks", lambda: _judge_clocks(facts)),
        attempt("shared folder", lambda: _judge_shared_folder(facts)),
        attempt("same versions", lambda: _judge_same("same versions", facts.versions)),
        attempt("same corpus", lambda: _judge_same("same corpus", facts.corpora)),
    ]


def slow_nodes(values: Mapping[str, Sequence[float]]) -> list[str]:
    """Nodes whose median falls below SLOW_SHARE of the median over all nodes; larger is better.

    A link is shared by two nodes: with only two of them neither can be told from the other, and none is named.
    """
    if len(values) < 3:
        return []
    medians = {name: statistics.median(each) for name, each in values.items()}
    typical = statistics.median(medians.values())
    return [name for name, median in medians.items() if median < SLOW_SHARE * typical]


def rounds(ranks: Sequence[int]) -> list[list[tuple[int, int]]]:
    """All pairs in as few rounds as possible, no rank twice in a round (the circle method of tournaments)."""
    circle: list[int | None] = [*ranks, *([None] if len(ranks) % 2 else [])]
    found = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(a, b) for a, b in pairs if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found


def node_names(hosts: Sequence[str], local_ranks: Sequence[int]) -> list[str]:
    """A name per rank for its node; containers may all have one host name, so a local rank met again is a new node."""
    counts: dict[tuple[str, int], int] = {}
    names = []
    for host, local in zip(hosts, local_ranks, strict=True):
        number = counts[host, local] = counts.get((host, local), 0) + 1
        names.append(host if number == 1 else f"{host}#{number}")
    return names


def _judge_rendezvous(facts: Facts) -> CheckResult:
    nodes = ", ".join(f"{name} x {count}" for name, count in facts.nodes.items())
    total = sum(facts.nodes.values())
    is_even = len(set(facts.nodes.values())) == 1
    return CheckResult(
        name="rendezvous",
        status="ok" if is_even else "warning",
        message=f"{total} ranks met: {nodes}",
        remedy="" if is_even else "the nodes have different numbers of ranks: was that meant?",
    )


def _judge_sums(facts: Facts) -> CheckResult:
    wrong = [rank for rank, is_right in facts.sums_are_right.items() if not is_right]
    speed = f"{facts.all_reduce_bytes_per_second / 1e9:.2f} GB/s bus bandwidth over all ranks"
    if wrong:
        told = f"wrong sum on ranks {', '.join(map(str, wrong))}"
        remedy = "a network or a memory is broken: leave these nodes out"
        return CheckResult(name="all-reduce", status="error", message=told, remedy=remedy)
    return CheckResult(name="all-reduce", status="ok", message=f"right on every rank; {speed}")


def _judge_links(facts: Facts) -> CheckResult:
    if not facts.links:
        return CheckResult(name="links", status="skipped", message="one rank has no links")
    speeds = _by_node(facts.links, lambda link: link.bytes_per_second)
    quickness = _by_node(facts.links, lambda link: 1 / link.microseconds)
    slow = list(dict.fromkeys([*slow_nodes(speeds), *slow_nodes(quickness)]))
    slowest = min(facts.links, key=lambda link: link.bytes_per_second)
    median = statistics.median(link.bytes_per_second for link in facts.links)
    delay = statistics.median(link.microseconds for link in facts.links)
    told = (
        f"median {median / 1e9:.2f} GB/s and {delay:.0f} us; slowest {slowest.first} - {slowest.second} "
        f"{slowest.bytes_per_second / 1e9:.2f} GB/s"
    )
    if slow:
        each = ", ".join(f"{name} ({statistics.median(speeds[name]) / 1e9:.2f} GB/s)" for name in slow)
        remedy = "leave it out (--exclude), and look at its cable, its interface and its NCCL_SOCKET_IFNAME"
        return CheckResult(name="links", status="warning", message=f"slow: {each}; {told}", remedy=remedy)
    return CheckResult(name="links", status="ok", message=told)


def _judge_processors(facts: Facts) -> CheckResult:
    times = facts.matmul_seconds
    typical = statistics.median(times.values())
    slow = [rank for rank, seconds in times.items() if seconds > typical / SLOW_SHARE]
    told = f"a matrix product takes {1e3 * typical:.1f} ms"
    if slow and len(times) > 2:
        each = ", ".join(f"rank {rank} ({1e3 * times[rank]:.1f} ms)" for rank in slow)
        remedy = "something else runs there, or the GPU is throttled"
        return CheckResult(
            name="processors", status="warning", message=f"slow: {each}; {told}", remedy=remedy
        )
    return CheckResult(
        name="processors",
        status="ok",
        message=f"{told}, on the slowest rank {1e3 * max(times.values()):.1f} ms",
    )


def _judge_clocks(facts: Facts) -> CheckResult:
    worst = max(facts.clock_offsets, key=lambda name: abs(facts.clock_offsets[name]))
    offset = facts.clock_offsets[worst]
    is_off = abs(offset) > CLOCK_SKEW_SECONDS
    return CheckResult(
        name="clocks",
        status="warning" if is_off else "ok",
        message=f"at most {abs(offset):.3f} s from rank 0's" + (f", on {worst}" if is_off else ""),
        remedy="times in logs and on files will contradict one another: start chronyd or ntpd"
        if is_off
        else "",
    )


def _judge_shared_folder(facts: Facts) -> CheckResult:
    blind = [name for name, sees in facts.sees_file.items() if not sees]
    if blind:
        return CheckResult(
            name="shared folder",
            status="error",
            message=f"a file that rank 0 wrote is not seen on {', '.join(blind)}",
            remedy="put run.output_dir on a filesystem that all nodes mount, and give it here as --folder",
        )
    return CheckResult(name="shared folder", status="ok", message="a file of rank 0 is seen on every node")


def _judge_same(name: str, of_nodes: Mapping[str, str]) -> CheckResult:
    if not of_nodes:
        return CheckResult(name=name, status="skipped", message="no --corpus was given")
    values = list(of_nodes.values())
    typical = statistics.mode(values)
    others = [node for node, value in of_nodes.items() if value != typical]
    if others:
        return CheckResult(
            name=name,
            status="error",
            message=f"{others[0]} has {of_nodes[others[0]]}, most have {typical}"
            + (f"; so have {', '.join(others[1:])}" if others[1:] else ""),
            remedy="give every node the same",
        )
    return CheckResult(name=name, status="ok", message=f"on every node {typical}")


def _by_node(links: Sequence[Link], value: Callable[[Link], float]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for link in links:
        for name in (link.first, link.second):
            found.setdefault(name, []).append(value(link))
    return found


def _gathered(value: Any) -> list[Any]:
    """A value of every rank, in rank order."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _sum_is_right(device: torch.device) -> bool:
    """Whole numbers, so that the sum is exact in whatever order it is made."""
    world, rank = dist.get_world_size(), dist.get_rank()
    numbers = torch.arange(2**16, dtype=torch.int64, device=device)
    summed = numbers * (rank + 1)
    dist.all_reduce(summed)
    return bool(torch.equal(summed, numbers * (world * (world + 1) // 2)))


def _all_reduce_bytes_per_second(device: torch.device) -> float:
    world = dist.get_world_size()
    data = torch.ones(LARGE_BYTES // 4, device=device)
    times = []
    for _ in range(4):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(data)
        _synchronize(device)
        times.append(time.perf_counter() - started)
    slowest = torch.tensor([min(times[1:])], device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return 2 * (world - 1) / world * LARGE_BYTES / float(slowest)


def _links(ranks: Sequence[int], device: torch.device) -> list[tuple[int, int, float, float]]:
    """First rank, second rank, seconds and bytes per second one way, for the pairs in which this rank is the first."""
    found = []
    rank = dist.get_rank()
    for pairs in rounds(ranks):
        for first, second in pairs:
            if rank in (first, second):
                peer = second if rank == first else first
                delay = _one_way(peer, rank == first, SMALL_BYTES, ROUND_TRIPS, device)
                large = _one_way(peer, rank == first, LARGE_BYTES, 2, device)
                if rank == first:
                    found.append((first, second, delay, LARGE_BYTES / large))
        dist.barrier()
    return found


def _one_way(peer: int, is_first: bool, size: int, round_trips: int, device: torch.device) -> float:
    """Half the shortest round trip of a message."""
    data = torch.zeros(size, dtype=torch.uint8, device=device)
    times = []
    for _ in range(round_trips + 1):  # the first makes the connection
        started = time.perf_counter()
        _exchange(data, peer, is_first)
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:]) / 2


def _exchange(data: Tensor, peer: int, is_first: bool) -> None:
    if is_first:
        dist.send(data, peer)
        dist.recv(data, peer)
    else:
        dist.recv(data, peer)
        dist.send(data, peer)


def _matmul_seconds(device: torch.device) -> float:
    size = 4096 if device.type == "cuda" else 256
    matrix = torch.ones(size, size, device=device)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        matrix @ matrix
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _clock_offsets(leaders: Sequence[int], device: torch.device) -> dict[int, float]:
    """Rank of each node -> seconds that its clock is ahead of rank 0's, by the middle of the shortest round trip."""
    rank = dist.get_rank()
    offsets = {leaders[0]: 0.0}
    data = torch.zeros(1, dtype=torch.float64, device=device)
    for leader in leaders[1:]:
        trips = []
        for _ in range(5):
            if rank == leaders[0]:
                sent = time.time()
                dist.send(data, leader)
                dist.recv(data, leader)
                received = time.time()
                trips.append((received - sent, float(data) - (sent + received) / 2))
            elif rank == leader:
                dist.recv(data, leaders[0])
                data.fill_(time.time())
                dist.send(data, leaders[0])
        if trips:
            offsets[leader] = min(trips)[1]
    return dict(_gathered(offsets)[leaders[0]])


def _sees_file(folder: Path) -> bool:
    """Whether a file that rank 0 writes appears here with its content."""
    content = _gathered(f"{time.time_ns()}")[0]
    path = folder / f".atomas-doctor-{content}"
    written = True
    if dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        except OSError:
            written = False
    dist.barrier()
    if not _gathered(written)[0]:
        return False
    sees = _read_within(path, content, VISIBLE_SECONDS)
    dist.barrier()
    if dist.get_rank() == 0:
        path.unlink(missing_ok=True)
    return sees


def _read_within(path: Path, content: str, patience: float) -> bool:
    end = time.monotonic() + patience
    while True:
        try:
            if path.read_text(encoding="utf-8") == content:
                return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.2)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
