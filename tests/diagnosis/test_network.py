"""What all ranks find together: the facts of broken clusters name the fault; two real processes find none."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from atomas.data.demo import build_demo_corpus
from atomas.diagnosis.network import Facts, Link, judge, node_names, rounds, slow_nodes

NODES = ("n1", "n2", "n3", "n4")


def facts(**changes: Any) -> Facts:
    """Four nodes of two ranks that are well."""
    pairs = itertools.combinations(NODES, 2)
    healthy = Facts(
        nodes=dict.fromkeys(NODES, 2),
        sums_are_right=dict.fromkeys(range(8), True),
        links=[Link(first=a, second=b, microseconds=5.0, bytes_per_second=20e9) for a, b in pairs],
        all_reduce_bytes_per_second=18e9,
        matmul_seconds=dict.fromkeys(range(8), 0.01),
        clock_offsets=dict.fromkeys(NODES, 0.001),
        sees_file=dict.fromkeys(NODES, True),
        versions=dict.fromkeys(NODES, "torch 2.13.0"),
        corpora=dict.fromkeys(NODES, "index 1a2b"),
    )
    return dataclasses.replace(healthy, **changes)


def links_of(slow: str, **worse: float) -> list[Link]:
    return [
        dataclasses.replace(link, **worse) if slow in (link.first, link.second) else link
        for link in facts().links
    ]


def test_a_healthy_cluster() -> None:
    assert {result.status for result in judge(facts())} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "name", "status", "message"),
    [
        ({"links": links_of("n3", bytes_per_second=1e9)}, "links", "warning", "slow: n3 (1.00 GB/s)"),
        ({"links": links_of("n2", microseconds=90.0)}, "links", "warning", "slow: n2 (20.00 GB/s)"),
        ({"sums_are_right": {0: True, 5: False}}, "all-reduce", "error", "wrong sum on ranks 5"),
        (
            {"matmul_seconds": {**dict.fromkeys(range(8), 0.01), 6: 0.03}},
            "processors",
            "warning",
            "slow: rank 6",
        ),
        (
            {"clock_offsets": {"n1": 0.0, "n4": -61.0}},
            "clocks",
            "warning",
            "at most 61.000 s from rank 0's, on n4",
        ),
        ({"sees_file": {"n1": True, "n2": False}}, "shared folder", "error", "is not seen on n2"),
        ({"versions": {"n1": "a", "n2": "b", "n3": "a"}}, "same versions", "error", "n2 has b, most have a"),
        (
            {"corpora": {"n1": "a", "n2": "a", "n3": "gone"}},
            "same corpus",
            "error",
            "n3 has gone, most have a",
        ),
        ({"corpora": {}}, "same corpus", "skipped", "no --corpus was given"),
        ({"links": []}, "links", "skipped", "one rank has no links"),
        ({"nodes": {"n1": 2, "n2": 1}}, "rendezvous", "warning", "3 ranks met: n1 x 2, n2 x 1"),
    ],
)
def test_a_broken_cluster(changes: dict[str, Any], name: str, status: str, message: str) -> None:
    results = {result.name: result for result in judge(facts(**changes))}
    found = results.pop(name)
    assert found.status == status
    assert message in found.message
    if status != "skipped":
        assert found.remedy
    assert {result.status for result in results.values()} == {"ok"}, "the fault is named once"


def test_two_nodes_cannot_be_told_apart() -> None:
    assert slow_nodes({"n1": [1.0], "n2": [1.0]}) == []
    assert slow_nodes({"n1": [9.0, 1.0], "n2": [9.0, 1.0], "n3": [1.0, 1.0]}) == ["n3"]


@pytest.mark.parametrize("count", range(1, 9))
def test_rounds_hold_every_pair_once(count: int) -> None:
    found = rounds(range(count))
    pairs = [frozenset(pair) for pairs in found for pair in pairs]
    assert len(pairs) == len(set(pairs)) == count * (count - 1) // 2
    for each in found:
        ranks = [rank for pair in each for rank in pair]
        assert len(ranks) == len(set(ranks))
    assert len(found) <= count


def test_nodes_with_one_host_name_are_told_apart() -> None:
    assert node_names(["a", "a", "b", "b"], [0, 1, 0, 1]) == ["a", "a", "b", "b"]
    assert node_names(["box", "box", "box", "box"], [0, 1, 0, 1]) == ["box", "box", "box#2", "box#2"]


@pytest.mark.slow
def test_two_real_processes(tmp_path: Path) -> None:
    build_demo_corpus(tmp_path / "corpus", pairs=60, seed=1, workers=1)
    done = subprocess.run(
        [
            sys.executable, "-m", "atomas", "launch", "--gpus-per-node=2", "--", "doctor", "--distributed", "--json",
            "--folder", str(tmp_path / "runs"), "--corpus", str(tmp_path / "corpus"),
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert "2 ranks met" in found["rendezvous"]["message"]
    assert found["all-reduce"]["status"] == "ok"
    assert "slowest rank 0 - rank 1" in found["links"]["message"]
    assert found["shared folder"]["status"] == "ok"
    assert found["same corpus"]["status"] == "ok"
    assert not list((tmp_path / "runs").iterdir())
