"""Ranks that are killed, stopped or fail; what they were started by goes on with the run by itself."""

import re

from tests.faults.ground import Ground, Run
from tests.faults.outcome import Outcome, fault

STRIKES_AT = 4
"""The batch at which the fault comes: three steps are done, and two are saved."""
LOCAL = "atomas launch, local"


def goes_on_by_itself(ground: Ground, name: str, fault: str) -> Outcome:
    """A launch with restarts; all it needs is the fault."""
    with ground.run(name, "--gpus-per-node=2", "--restarts=2", fault=fault) as run:
        struck = run.struck()
        return recovered(run, struck, start=LOCAL)


def recovered(run: Run, struck: float, *, start: str) -> Outcome:
    """Wait until the launch has noticed, has started the run again, and has ended well."""
    detected = run.says("; started again in")
    resumed = run.trains(2)
    run.ends(0)
    found = re.search(r"failed: (.*); started again in", run.text())
    assert found is not None
    return run.outcome(
        happened=in_short(found.group(1)),
        start=start,
        again="the launcher",
        struck=struck,
        detected=detected,
        resumed=resumed,
    )


def in_short(story: str) -> str:
    """Without hosts, which are all this one here, and without where gloo's sources were compiled."""
    return re.sub(r" \(\S+\)|\[/\S+\] |\. This is typically caused.*", "", story)


@fault("kill -9 of rank 0")
def kill_rank_0(ground: Ground) -> Outcome:
    return goes_on_by_itself(ground, "kill_0", f"kill 0 {STRIKES_AT}")


@fault("kill -9 of rank 1", is_quick=True)
def kill_rank_1(ground: Ground) -> Outcome:
    return goes_on_by_itself(ground, "kill_1", f"kill 1 {STRIKES_AT}")


@fault("kill -9 of rank 0 in the middle of its part of a save")
def kill_in_save_0(ground: Ground) -> Outcome:
    return goes_on_by_itself(ground, "kill_save_0", "kill 0 save")


@fault("kill -9 of rank 1 in the middle of its part of a save")
def kill_in_save_1(ground: Ground) -> Outcome:
    return goes_on_by_itself(ground, "kill_save_1", "kill 1 save")


@fault("kill -9 of rank 0 before a checkpoint is published")
def kill_in_publish(ground: Ground) -> Outcome:
    return goes_on_by_itself(ground, "kill_publish", "kill 0 publish")


@fault("SIGSTOP of rank 0 (a hang)")
def stop_rank_0(ground: Ground) -> Outcome:
    return goes_on_by_itself(ground, "stop_0", f"stop 0 {STRIKES_AT}")


@fault("SIGSTOP of rank 1 (a hang)")
def stop_rank_1(ground: Ground) -> Outcome:
    return goes_on_by_itself(ground, "stop_1", f"stop 1 {STRIKES_AT}")


@fault("an error in rank 1")
def error_in_rank_1(ground: Ground) -> Outcome:
    return goes_on_by_itself(ground, "raise_1", f"raise 1 {STRIKES_AT}")
