"""Evaluations: snapshots on their way to the eval actors, results on their way back, and the best policy so far."""
