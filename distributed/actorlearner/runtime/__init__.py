"""Infrastructure without reinforcement learning: lifecycle, configuration, messages, checkpoints, telemetry."""
