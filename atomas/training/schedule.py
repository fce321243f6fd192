"""Learning rate as a function of the step: nothing to save, nothing to restore."""

import math

from atomas.config import Config


def learning_rate(config: Config, step: int) -> float:
    """Rate of optimizer step `step` (0 is the first): linear warm-up, then a half cosine or a constant."""
    peak, schedule = config.optimizer.learning_rate, config.schedule
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return peak
    span = max(1, config.training.max_steps - 1 - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / span)
    return peak * (
        schedule.final_ratio + (1 - schedule.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    )
