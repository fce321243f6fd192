"""Engine, step loop, checkpoints, schedules and telemetry."""
