"""The inside of the learner: the compiled call, the training loop, and the start and end of a run."""
