"""`atomas bench distributed`: the same loss in every form, bytes as planned, work as counted."""

import json
from pathlib import Path
from typing import Any

import pytest

from atomas.benchmarks.distributed.paper import default_work, paper_rows, plan_form
from atomas.cli import main
from atomas.planning.hardware import GPUS, Assumptions, Cluster

FORMS = ("allgather", "ring", "gather_everything", "local_loss")


@pytest.fixture(scope="module", params=["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    sizes = [
        "--pairs",
        "4",
        "--width",
        "32",
        "--runs",
        "1",
        "--paper-pairs",
        "8",
        "--device",
        "cpu",
        "--as-if",
        "3",
        "--precision",
        request.param,
    ]
    files = ["--json", str(folder / "report.json"), "--plot", str(folder / "plot.png")]
    main(["bench", "distributed", "--ranks", "2", *sizes, *files])
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    return json.loads(Path(folder / "report.json").read_text(encoding="utf-8"))


def test_every_form_has_the_same_loss(report: dict[str, Any]) -> None:
    assert [row["form"] for row in report["rows"]] == list(FORMS)
    losses = [row["loss"] for row in report["rows"]]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    assert losses[0] > 0


def test_bytes_are_those_on_paper(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        assert row["planned_sent_bytes"] == pytest.approx(row["sent_bytes"], rel=0.1), row["form"]


def test_one_device_has_a_time_for_every_form_that_differs_there(report: dict[str, Any]) -> None:
    assert [(row["form"], row["as_if_ranks"], row["status"]) for row in report["one_device"]] == [
        (form, 3, "ok") for form in FORMS if form != "ring"
    ]


def test_work_of_a_rank_grows_with_the_ranks_as_each_form_says() -> None:
    work = default_work(64, 16, "bf16")
    rows = paper_rows(
        work,
        FORMS,
        Cluster(gpu=GPUS["h200"], nodes=1, gpus_per_node=8, link_bytes_per_second=5e10),
        Assumptions(),
    )
    of = {(row["form"], row["ranks"]): row for row in rows}
    one = plan_form("allgather", work)
    for ranks in (2, 1024):
        ours = of["allgather", ranks]["flops"] - one.flops
        assert ours == pytest.approx((ranks - 1) * one.interaction_flops)  # own pairs against more
        more = of["gather_everything", ranks]["flops"]
        assert more == pytest.approx(ranks * (one.flops + (ranks - 1) * one.interaction_flops))
        assert of["local_loss", ranks]["flops"] > of["allgather", ranks]["flops"]
    assert len({of[form, 1]["flops"] for form in FORMS if form != "local_loss"}) == 1
