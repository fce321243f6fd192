"""Profiles: every example is valid, every mistake names file, line and the nearest key."""

from pathlib import Path

import pytest

from atomas_launcher.errors import LaunchError
from atomas_launcher.profile import find_profile, read_profile, seconds
from tests.launcher.conftest import ROOT

EXAMPLES = sorted((ROOT / "configs" / "clusters").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(path: Path) -> None:
    profile = read_profile(path)
    assert profile.gpus_per_node > 1
    if profile.time_limit:
        assert seconds(profile.time_limit) > profile.warning_seconds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "backend: slurm\npartitoin: gpu\n",
            r"p\.yaml:2: unknown key 'partitoin'; did you mean 'partition'\?",
        ),
        (
            "container:\n  imgae: x\n",
            r"p\.yaml:2: unknown key 'container.imgae'; did you mean 'container.image'\?",
        ),
        ("zzz: 1\n", r"p\.yaml:1: unknown key 'zzz'; known: backend, device"),
        ("backend: slrum\n", r"p\.yaml:1: backend = 'slrum' must be one of local.*\(did you mean slurm\?\)"),
        ("gpus_per_node: many\n", r"p\.yaml:1: gpus_per_node = 'many' must be a whole number"),
        ("modules: cuda\n", r"p\.yaml:1: modules must be a list such as \[a, b\]"),
        ("environment: [A]\n", r"p\.yaml:1: environment must be a mapping"),
        ("account: a\naccount: b\n", r"p\.yaml:2: 'account' is given twice"),
        ("- slurm\n", r"p\.yaml:1: a profile must be a mapping"),
        ("a: [\n", r"p\.yaml:2: not valid YAML"),
        ("backend: kubernetes\n", r"p\.yaml: backend kubernetes needs container\.image"),
        ("container: {runtime: docker}\n", r"p\.yaml: container\.runtime = docker needs container\.image"),
        ("environment: {A B: x}\n", r"p\.yaml: 'A B' is not the name of an environment variable"),
        ('account: "a\\nb"\n', r"p\.yaml: 'a\\nb' has a control character"),
    ],
)
def test_mistakes(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(LaunchError, match=message) as caught:
        read_profile(path)
    assert "\n" not in str(caught.value)


def test_values_of_the_environment_are_as_written(tmp_path: Path) -> None:
    """YAML 1.1 would read them as a number, as seconds and as a truth value."""
    path = tmp_path / "p.yaml"
    path.write_text("environment: {A: 010, B: 12:30, C: yes, D: 1e3}\n", encoding="utf-8")
    assert read_profile(path).environment == {"A": "010", "B": "12:30", "C": "yes", "D": "1e3"}


def test_a_name_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    assert find_profile("slurm-generic").partition == "gpu"
    own = tmp_path / "atomas" / "clusters"
    own.mkdir(parents=True)
    (own / "slurm-generic.yaml").write_text("partition: mine\n", encoding="utf-8")
    assert find_profile("slurm-generic").partition == "mine"
    with pytest.raises(LaunchError, match=r"no cluster 'slurm-genric' in .*; did you mean 'slurm-generic'\?"):
        find_profile("slurm-genric")
    with pytest.raises(LaunchError, match=r"cluster profile other\.yaml cannot be read"):
        find_profile("other.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 5400), ("1:30", 90), ("1:30:00", 5400), ("2-12", 216000), ("1-12:30:05", 131405)],
)
def test_time_limits(text: str, expected: int) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "-5", "0"])
def test_what_is_no_time_limit(text: str) -> None:
    with pytest.raises(LaunchError, match="time limit"):
        seconds(text)
