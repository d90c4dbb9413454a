"""A frozen or hung role is distinguished from a working one."""

from __future__ import annotations

import signal

import portpicker

from actorlearner.runtime.health import describe_problem

HANGING = """
import hanging_cartpole
include 'dqn_cartpole.gin'
gym_environment.env_name = 'HangingCartPole-v0'
"""


def test_a_frozen_replay_server_is_told_from_one_at_work(processes, tmp_path, eventually):
    """The check looks at the role's work, not at whether there is a process."""
    alive = tmp_path / "alive"
    port = portpicker.pick_unused_port()
    server = processes.start("replay-server", "dqn_cartpole", f"--port={port}", f"--health_file={alive}")
    server.await_line("serving replay")
    eventually(alive.exists)
    server.send(signal.SIGSTOP)
    eventually(lambda: describe_problem(alive, max_age_secs=2) is not None)
    check = processes.start("health", alive, "--max_age_secs=2")
    assert check.wait(60) == 1
    assert "the last heartbeat is" in check.output
    server.send(signal.SIGCONT)
    eventually(lambda: describe_problem(alive, max_age_secs=2) is None)
    check = processes.start("health", alive, "--max_age_secs=60")
    assert check.wait(60) == 0


def test_a_role_that_hangs_says_where_it_is_and_ends(processes, tmp_path):
    """Its launcher starts it again; one that hangs for good is waited for in vain by everybody."""
    (tmp_path / "hanging.gin").write_text(HANGING)
    actor = processes.start("eval-actor", "hanging.gin", "--hang_secs=60")  # to import TensorFlow may take thirty
    assert actor.wait(240) == 1
    assert "Timeout (0:01:00" in actor.output and 'hanging_cartpole.py", line 15 in __init__' in actor.output
