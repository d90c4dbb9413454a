"""Edge 1: carries trajectories from the collect actors to the learner."""
