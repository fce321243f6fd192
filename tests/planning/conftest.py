"""Real runs of `atomas train` whose allocations and messages are counted, beside what is planned for them."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atomas.config_file import load_config
from atomas.data.demo import build_demo_corpus
from atomas.planning.sizes import T5Sizes
from atomas.planning.workload import PairLengths, Workload

SMALL = (
    "--tokenizer.vocab_size=400", "--data.batch_size=8", "--data.token_budget=4096", "--data.num_workers=0",
    "--model.d_model=64", "--model.d_kv=16", "--model.d_ff=128", "--model.num_layers=1",
    "--model.num_decoder_layers=1", "--model.num_heads=4", "--momentum.queue_size=100", "--run.device=cpu",
    "--run.threads=1", "--evaluation.every=0", "--checkpoint.every=0", "--training.max_steps=4",
)  # fmt: skip


@dataclass(frozen=True)
class CountedRun:
    """What `counted_run.py` counted, and the workload that it was."""

    counted: dict[str, Any]
    work: Workload
    folder: Path
    """of its first attempt"""

    @property
    def stage(self) -> int:
        return self.work.config.deepspeed.zero_stage


Counter = Callable[..., CountedRun]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "corpus"
    build_demo_corpus(folder, pairs=240, seed=3, workers=1)
    return folder


@pytest.fixture
def count(corpus: Path, tmp_path: Path) -> Counter:
    """`count("traffic", "--key=value", ..., ranks=2)` runs four steps, where it can in a network of its own."""

    def run(what: str, *overrides: str, ranks: int = 1) -> CountedRun:
        out = tmp_path / "counted.json"
        where = [f"--data.corpus={corpus}", f"--run.output_dir={tmp_path / 'runs'}", "--run.name=counted"]
        keys = [*SMALL, *where, *overrides]
        script = [str(Path(__file__).with_name("counted_run.py")), what, str(out), *keys]
        python = [sys.executable]
        if ranks > 1:
            python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        network = [] if ranks == 1 else own_network()
        done = subprocess.run([*network, *python, *script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        counted = json.loads(out.read_text(encoding="utf-8"))
        return CountedRun(
            counted, workload(counted, keys, ranks), tmp_path / "runs" / "counted" / "attempts" / "1"
        )

    return run


def own_network() -> Sequence[str]:
    """What starts a command in a network namespace with nothing but a loopback interface; nothing without the right."""
    start = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    try:
        allowed = subprocess.run([*start, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        allowed = False
    return start if allowed else []


def workload(counted: dict[str, Any], keys: Sequence[str], ranks: int) -> Workload:
    """The plan's input with the lengths that rank 0 had in the counted steps."""
    config = load_config(None, keys)
    lengths = PairLengths(text=np.array(counted["text"]), smiles=np.array(counted["smiles"]))
    t5 = T5Sizes.of_model(config.model, config.tokenizer.vocab_size)
    return Workload(config, t5, lengths, config.data.batch_size // ranks, ranks)
