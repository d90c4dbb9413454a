"""A role that is frozen or hangs is told from one at work."""

from __future__ import annotations

import signal

import portpicker

from actorlearner.runtime.health import describe_problem


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
    assert "the last sign of life is" in check.output
    server.send(signal.SIGCONT)
    eventually(lambda: describe_problem(alive, max_age_secs=2) is None)
    check = processes.start("health", alive, "--max_age_secs=60")
    assert check.wait(60) == 0


def test_a_role_that_does_not_go_on_says_where_it_is_and_ends(processes):
    """Its launcher starts it again; one that hangs for good is waited for in vain by everybody."""
    actor = processes.start("eval-actor", "dqn_cartpole", "--hang_secs=0.5")  # to begin takes longer
    assert actor.wait(60) == 1
    assert "Timeout (0:00:00.5" in actor.output and "(most recent call first)" in actor.output
