"""The inside of the learner: the compiled call, the loop around it, and what comes before and after."""
