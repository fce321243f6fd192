"""Configuration: strict, quick, and every mistake in one line with a place and a way out."""

import dataclasses
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from atomas.config import Config
from atomas.config_file import config_keys, dump_config, load_config
from atomas.errors import AtomasError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_round_trip(tmp_path: Path) -> None:
    config = load_config(
        None, ["--run.name", "x", "--model.ratios", "[0.5]", "--loss.level_weights", "[1, 2]"]
    )
    assert load_config(write(tmp_path / "c.yaml", dump_config(config))) == config
    assert (config.model.ratios, config.loss.level_weights) == ((0.5,), (1.0, 2.0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one", "one"),
        ("s3://bucket/one", "s3://bucket/one"),
        ("2024", "2024"),
        ("[one, s3://bucket/two]", ("one", "s3://bucket/two")),
        ("{one: 1, 's3://bucket/two': 2.5}", {"one": 1.0, "s3://bucket/two": 2.5}),
    ],
)
def test_one_corpus_or_several(tmp_path: Path, text: str, expected: object) -> None:
    for config in (
        load_config(write(tmp_path / "c.yaml", f"data:\n  corpus: {text}\n")),
        load_config(None, [f"--data.corpus={text}"]),
    ):
        assert config.data.corpus == expected
        assert load_config(write(tmp_path / "again.yaml", dump_config(config))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "data.corpus = [] must name a corpus"),
        ("[a, a]", "one is given twice"),
        ("{a: 0}", "weights above 0"),
        ("{a: heavy}", "data.corpus.a = 'heavy' must be a number"),
        ("true", "data.corpus = True must be text"),
    ],
)
def test_corpora_that_cannot_be_meant(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(AtomasError, match=re.escape(message)):
        load_config(write(tmp_path / "c.yaml", f"data:\n  corpus: {text}\n"))


def test_extends_and_overrides(tmp_path: Path) -> None:
    write(
        tmp_path / "base.yaml", "training: {max_steps: 5, log_every: 2}\noptimizer:\n  learning_rate: 1e-3\n"
    )
    child = write(tmp_path / "child.yaml", "extends: base.yaml\ntraining: {max_steps: 7}\n")
    config = load_config(child, ["--training.log-every=3"])
    assert dataclasses.astuple(config.training)[0] == 7
    assert config.training.log_every == 3
    assert config.optimizer.learning_rate == 1e-3  # YAML 1.1 alone would read text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "data:\n  corpus: a\n  batchsize: 3\n",
            r"c\.yaml:3: unknown key 'data\.batchsize'; did you mean 'data\.batch_size'\?",
        ),
        ("dta:\n  corpus: a\n", r"c\.yaml:1: unknown section 'dta'; did you mean 'data'\?"),
        ("data:\n  learning_rate: 1\n", r"c\.yaml:2: .*did you mean 'optimizer\.learning_rate'\?"),
        ("data:\n  batch_size: many\n", r"c\.yaml:2: data\.batch_size = 'many' must be a whole number"),
        ("data:\n  batch_size: 2.5\n", r"c\.yaml:2: data\.batch_size = 2\.5 must be a whole number"),
        ("data:\n  batch_size: true\n", r"c\.yaml:2: data\.batch_size = True must be a whole number"),
        ("\ntraining:\n  max_steps: 0\n", r"c\.yaml:3: training\.max_steps = 0: must be at least 1"),
        ("loss:\n  task: genmo\n", r"c\.yaml:2: loss\.task = 'genmo' must be one of .*did you mean genmol\?"),
        ("loss:\n  alpha: .nan\n", r"c\.yaml:2: loss\.alpha = nan must be a number"),
        ("model:\n  ratios: 0.5\n", r"c\.yaml:2: model\.ratios = 0\.5 must be a list"),
        ("model:\n  d_model: 100\n", r"model\.d_model = 100 is not divisible"),
        ("data: [1]\n", r"c\.yaml:1: section 'data' must be a mapping"),
        ("- a\n", r"c\.yaml:1: the file must be a mapping"),
        ("a: [\n", r"c\.yaml:2: not valid YAML"),
        ("data:\n  corpus: a\n  corpus: b\n", r"c\.yaml:3: 'corpus' is given twice"),
        ("extends: c.yaml\n", r"extends itself"),
        ("extends: none.yaml\n", r"config file .*none\.yaml does not exist"),
        ("data:\n  corpus: !!python/object:os.system x\n", r"c\.yaml:2: could not determine a constructor"),
        ("loss:\n  level_weights: [1]\n", r"loss\.level_weights has 1 entries, model\.ratios makes 3 levels"),
        ("optimizer: {beta1: 1.5}\n", r"optimizer\.beta1 = 1\.5: must be in \[0, 1\)"),
        ("loss: {level_weights: [-1, 0, 0]}\n", r"loss\.level_weights = .* must not be negative"),
        ("deepspeed: {extra: {elasticity: {}}}\n", r"deepspeed\.extra: 'elasticity' cannot be set there"),
        ("training: {precision: fp16}\ndeepspeed: {zero_stage: 0}\n", "fp16 with .*use stage 1, .* or bf16"),
        ("training: {compile: true}\ndeepspeed: {zero_stage: 3}\n", r"training\.compile with .*use stage 2"),
        ("deepspeed: {extra: {zero_optimization: {stage: 1}}}\n", r"'zero_optimization\.stage' cannot be set there"),
        ("loss: {global_weight: 0, hierarchical_weight: 0, lm_weight: 0}\n", r"every loss weight is 0"),
    ],
)  # fmt: skip
def test_mistakes_in_a_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(AtomasError, match=message) as caught:
        load_config(write(tmp_path / "c.yaml", text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--data.batchsize", "3"], r"--data\.batchsize: unknown key .*did you mean 'data\.batch_size'\?"),
        (["--data.batch_size"], r"--data\.batch_size needs a value"),
        (["--data.batch_size", "x"], r"--data\.batch_size: data\.batch_size = 'x' must be a whole number"),
        (["batch_size"], r"unexpected argument 'batch_size'"),
    ],
)
def test_mistakes_in_overrides(overrides: list[str], message: str) -> None:
    with pytest.raises(AtomasError, match=message):
        load_config(None, overrides)


def test_every_key_is_documented_and_bounded() -> None:
    source = Path(sys.modules[Config.__module__].__file__ or "").read_text(encoding="utf-8")
    for key in config_keys():
        name = key.split(".")[1]
        assert re.search(rf'    {name}: [^\n]+\n    """', source), f"{key} has no docstring"


def test_shipped_configurations_load() -> None:
    files = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
    assert files
    for file in files:
        if file.parent.name != "clusters":
            load_config(file)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["train", "--config", "missing.yaml"], 2),
        (["train", "--data.batchsize", "3"], 2),
        (["evaluate", "--help"], 0),
        (["data", "--help"], 0),
        (["verify", "--help"], 0),
        (["config", "explain", "data.batchsize"], 2),
    ],
)
def test_help_and_errors_are_quick(arguments: list[str], code: int) -> None:
    """Half a second is promised: of the processor, since other work may share the machine; the best of several."""
    times = []
    for _ in range(5):
        started = _seconds_of_children()
        done = subprocess.run(
            [sys.executable, "-m", "atomas", *arguments], capture_output=True, text=True, check=False
        )
        times.append(_seconds_of_children() - started)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        if times[-1] < 0.5:
            break
    assert min(times) < 0.5
    if code == 2:
        assert done.stderr.startswith("atomas: error: ")
        assert done.stderr.count("\n") == 1


def _seconds_of_children() -> float:
    """Processor time of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
