"""Why a record is left out: a negative number in the place of its split's."""

from pathlib import Path

from atomas.data.building.plan import Plan

DUPLICATE = {"molecule": -1, "text": -2, "pair": -3}
EXCLUDED = -10
"""Outcome of a record whose molecule is in reference n: EXCLUDED - n."""


def describe_outcome(outcome: int, plan: Plan) -> tuple[str, str]:
    """Hazard and reason of a record that is left out."""
    if outcome <= EXCLUDED:
        reference = plan.recipe.exclude[EXCLUDED - outcome]
        return "leakage", f"its {plan.recipe.exclude_by} is in {Path(reference).name}"
    criterion = next(name for name, code in DUPLICATE.items() if code == outcome)
    what = "its molecule and text are" if criterion == "pair" else f"its {criterion} is"
    return "deduplicated", f"{what} in an earlier row"
