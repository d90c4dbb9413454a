"""The system's own fault tests: they inject into small runs what happens to long ones. Not installed.

run.py is the command, drilled_run.py the run that is broken, faults.py lists what is done to it (deaths.py, damage.py,
disturbances.py) and judging.py checks which promises held.
"""
