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
