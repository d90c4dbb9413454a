"""Edge 1: trajectories on their way from the collect actors to the learner."""
