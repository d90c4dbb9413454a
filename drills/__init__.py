"""The system's own fault tests: what happens to long runs is done to small ones. Not installed with the package.

run.py is the command, drilled_run.py the run that is broken, faults.py lists what is done to it (deaths.py, damage.py,
disturbances.py) and judging.py says which promises held.
"""
