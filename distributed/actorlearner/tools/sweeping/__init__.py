"""The parts of a sweep: the grid of variants and seeds, trials, the race, and the report."""
