"""Tools that people run besides training."""
