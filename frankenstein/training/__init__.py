"""Training: the loop, schedules, stability guard, checkpoints, telemetry, pretraining and the ternary finish."""
