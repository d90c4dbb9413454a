"""Knows no reinforcement learning: lifecycle, configuration, messages between processes, checkpoints, telemetry."""
