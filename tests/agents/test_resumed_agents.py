"""With any optimizer, a resumed run restores each moment to its own variable."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import actorlearner


def run(what, folder, output, hash_seed):
    ended = subprocess.run(
        [sys.executable, Path(__file__).with_name("resumed_agents.py"), what, folder, output],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(actorlearner.__file__).parents[1]),
            "PYTHONHASHSEED": hash_seed,
            "CUDA_VISIBLE_DEVICES": "-1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3_000:]
    with np.load(output) as found:
        return dict(found)


def test_every_algorithm_resumes_in_another_process_with_each_moment_at_its_own_variable(tmp_path):
    """TF-Agents' TD3 lists critic variables in another order in each process, and Keras saves moments by index."""
    saved = run("save", tmp_path / "checkpoints", tmp_path / "saved.npz", "1")
    restored = run("restore", tmp_path / "checkpoints", tmp_path / "restored.npz", "2")
    moments = {name.split(" of ")[0] for name in saved if " of " in name}
    agents = {name.split(":")[0] for name in moments}
    assert {"actorlearner.agents.sac", "actorlearner.agents.dqn", "TD3", "DDPG", "PPO", "CQL"} <= agents
    assert len(moments) > 50, "of about thirty optimizers"
    assert saved.keys() == restored.keys()
    different = [name for name, value in saved.items() if not np.array_equal(value, restored[name])]
    assert not different
