"""What the roles of one local run are started with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from actorlearner.launcher.options import LocalOptions, make_command
from actorlearner.runtime.ports import find_free_ports


def test_every_role_gets_its_own_flags_and_no_other():
    options = LocalOptions(
        experiment="dqn_cartpole",
        root_dir=Path("runs/x"),
        seed=7,
        gin_bindings=("train.gamma = 0.9", "train.num_iterations = 3"),
        learner_flags=("--strategy=mirrored",),
        command=("actorlearner",),
    )
    common = [
        "dqn_cartpole",
        "--replay_address=127.0.0.1:4321",
        "--variables_address=127.0.0.1:4321",
        "--task=0",
        "--root_dir=runs/x",
        "--seed=7",
        "--gin_bindings=train.gamma = 0.9",
        "--gin_bindings=train.num_iterations = 3",
    ]
    for kind, own in (
        ("replay-server", ["--port=4321", "--local_only"]),
        ("learner", ["--strategy=mirrored"]),
        ("eval-actor", []),
        ("collect-actor", []),
    ):
        assert make_command(options, kind, task=0, ports=[4321]) == ["actorlearner", kind, *common, *own]
    assert "--seed=" not in " ".join(make_command(dataclasses.replace(options, seed=None), "learner", 0, [1]))


def test_of_several_replay_servers_each_listens_on_its_own_port_and_the_first_has_the_variables():
    options = LocalOptions("dqn_cartpole", Path("runs/x"), command=("actorlearner",))
    second = make_command(options, "replay-server", task=1, ports=[1, 2])
    assert {"--replay_address=127.0.0.1:1,127.0.0.1:2", "--task=1", "--port=2"} < set(second)
    assert "--variables_address=127.0.0.1:1" in second
    assert len(set(find_free_ports(20))) == 20


def test_all_but_the_replay_server_go_through_the_proxy_in_front_of_it():
    """A role that goes round it never feels what happens there."""
    options = LocalOptions("dqn_cartpole", Path("runs/x"), via="127.0.0.1:9", command=("actorlearner",))
    for kind in ("learner", "eval-actor", "collect-actor"):
        command = make_command(options, kind, task=0, ports=[1])
        assert {"--replay_address=127.0.0.1:9", "--variables_address=127.0.0.1:9"} < set(command)
    server = make_command(options, "replay-server", task=0, ports=[1])
    assert {"--replay_address=127.0.0.1:1", "--variables_address=127.0.0.1:1", "--port=1"} < set(server)
    with pytest.raises(ValueError, match="via is 127.0.0.1:9, a proxy in front of one replay server"):
        dataclasses.replace(options, num_replay_servers=2)


@pytest.mark.parametrize("counts", [{"num_collect_actors": 0}, {"num_eval_actors": -1}, {"num_replay_servers": 0}])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueError, match=next(iter(counts))):
        LocalOptions(experiment="x", root_dir=Path("x"), **counts)
