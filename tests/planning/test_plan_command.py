"""`atomas plan`, as it is called."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from atomas.cli import main
from atomas.config import Config
from atomas.planning.hardware import GPUS, Assumptions, Cluster
from atomas.planning.model import SWEEP, communication_bound, scaling
from atomas.planning.sizes import T5Sizes
from atomas.planning.workload import PairLengths, Workload

COMMAND = ["plan", "--nodes", "64", "--gpus-per-node", "8", "--gpu", "h200", "--link-gbps", "400"]


def test_plan_prints_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "plan.json"), "--plot", str(tmp_path / "plan.png")]
    main([*COMMAND, *files, "--data.batch_size", "4096", "--training.precision", "bf16"])
    printed = capsys.readouterr().out
    assert "B = 4,096" in printed
    for component in ("optimizer states", "queue", "heads", "token blocks of other ranks"):
        assert component in printed
    report = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert [step["gpus"] for step in report["scaling"]["ring"]] == list(SWEEP)
    for steps in report["steps"].values():
        assert [step["zero_stage"] for step in steps] == [0, 1, 2, 3]
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0"], "--nodes 0: must be greater than 0"),
        (["--assume", "speed=2"], "--assume 'speed=2'"),
        (["--tokenizer.source", "nowhere"], "give the number of pieces as --vocabulary"),
        (["--corpus", "nowhere", "--mean-text-tokens", "3"], "--corpus measures the lengths"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_lengths_of_a_corpus(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--corpus", str(corpus), "--tokenizer.vocab_size", "400"])
    printed = capsys.readouterr().out
    assert "110 text and 73 SMILES" not in printed
    assert "pairs of" in printed


def test_no_torch_is_needed() -> None:
    code = f"import sys; from atomas.cli import main; main({COMMAND!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_communication_takes_over_where_links_are_slow() -> None:
    config = Config()
    work = Workload(config, T5Sizes.of_model(config.model, 1000), PairLengths.equal(100, 60), 2048)

    def bound(link: float) -> int | None:
        cluster = Cluster(gpu=GPUS["h100"], nodes=1, gpus_per_node=8, link_bytes_per_second=link)
        return communication_bound(scaling(work, 2, cluster, Assumptions()))

    slow, fast = bound(1e6), bound(1e15)
    assert slow == 16  # the first size with more than one node
    assert fast is None or fast > slow
