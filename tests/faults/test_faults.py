"""Real runs and real faults: each ends in the losses of a run that nothing happened to."""

import pytest

from tests.faults import catalogue
from tests.faults.ground import Ground
from tests.faults.outcome import CannotPlayError, Fault


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(each, id=each.name, marks=[] if each.is_quick else pytest.mark.slow)
        for each in catalogue.FAULTS
    ],
)
def test_the_run_goes_on_to_the_same_losses(ground: Ground, fault: Fault) -> None:
    try:
        outcome = fault.play(ground)
    except CannotPlayError as reason:
        pytest.skip(str(reason))
    assert outcome.deviation == 0
    assert outcome.steps_lost <= fault.lost


@pytest.mark.slow
def test_what_fails_twice_alike_is_not_tried_a_third_time(ground: Ground) -> None:
    """An error that comes again after the same step, by the same rank: three restarts are allowed, one is made."""
    options = ("--gpus-per-node=2", "--restarts=3")
    with ground.run(
        "again", *options, fault="raise 1 4", in_every_attempt=True, train=["--checkpoint.every=0"]
    ) as run:
        run.ends(1, 76)
        assert "not started again: it failed twice alike, after step 3: rank 1" in run.text()
        assert "shard 7 is broken" in run.text()
        assert sorted(path.name for path in (run.folder / "attempts").iterdir()) == ["1", "2"]
