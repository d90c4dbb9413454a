"""Evaluations: snapshots for the eval actors, their results, and the best policy so far."""
