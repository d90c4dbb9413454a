"""Reinforcement learning as separate processes: replay server, collect actors, eval actor and learner."""

__version__ = "0.1.0"
