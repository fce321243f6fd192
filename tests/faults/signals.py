"""A signal to one rank alone, in every phase: the run saves once, ends with 75, and goes on where it is told to."""

import re

from tests.faults.ground import Ground
from tests.faults.outcome import Outcome, fault
from tests.faults.ranks import LOCAL

RESUME = 75


def saves_and_goes_on(ground: Ground, name: str, strike: str, *train: str) -> Outcome:
    """The launch ends with 75 after one save; the same command continues it."""
    with ground.run(name, fault=strike, train=train) as run:
        struck = run.struck()
        detected = run.ends(RESUME)
        stopped = re.search(r"stopped after step (\d+) and saved", run.log())
        assert stopped is not None, run.log()
        assert run.log().count("stopped after step") == 1
        newest = (run.folder / "LATEST").read_text(encoding="utf-8").strip()
        assert newest == f"step_{int(stopped.group(1)):08d}"
        assert not list((run.folder / "checkpoints").glob("*.partial"))
    with ground.run(name, train=train) as again:
        resumed = again.trains(2)
        again.ends(0)
        return again.outcome(
            happened=f"{stopped.group()}; exit code {RESUME}", start=LOCAL, again="the same command", struck=struck,
            detected=detected, by_hand=again.started, resumed=resumed,
        )  # fmt: skip


@fault("SIGTERM to rank 1 in the first step", lost=0)
def term_in_first_step(ground: Ground) -> Outcome:
    return saves_and_goes_on(ground, "term_first", "term 1 first-step")


@fault("SIGTERM to rank 0 while it waits for data", lost=0)
def term_in_data_wait(ground: Ground) -> Outcome:
    return saves_and_goes_on(ground, "term_data", "term 0 4")


@fault("SIGUSR1 to rank 1 while it waits for data", lost=0)
def usr1_in_data_wait(ground: Ground) -> Outcome:
    return saves_and_goes_on(ground, "usr1_data", "usr1 1 4")


@fault("SIGTERM to rank 1 in an evaluation", lost=0)
def term_in_evaluation(ground: Ground) -> Outcome:
    return saves_and_goes_on(ground, "term_evaluation", "term 1 evaluation", "--evaluation.every=3")


@fault("SIGTERM to rank 1 in the middle of a save", lost=0)
def term_in_save(ground: Ground) -> Outcome:
    return saves_and_goes_on(ground, "term_save", "term 1 save")


@fault("SIGTERM to rank 0 before a checkpoint is published", lost=0)
def term_in_publish(ground: Ground) -> Outcome:
    return saves_and_goes_on(ground, "term_publish", "term 0 publish")
