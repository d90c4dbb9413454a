"""The README's commands, run as they are written but for flags that make them small."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from actorlearner.runtime.ports import find_free_port
from tests.e2e.processes import RUN_SECS, TINY, Process, Processes, bind

CHECKOUT = Path(__file__).parents[2]

TINY_MINITAUR = bind(
    "train.num_iterations = 20",
    "train.initial_collect_steps = 60",
    "train.batch_size = 16",
    "train.log_interval = 10",
    "train.eval_interval = 10",
    "train.num_eval_episodes = 1",
    "train.num_final_eval_episodes = 1",
    "train.policy_save_interval = 10",
    "pybullet_environment.max_episode_steps = 40",
)
TINY_CARTPOLE = bind(*TINY)
NO_VIDEO = ["--num_video_episodes=0"]

# Every command in the README, and what is added to it here; None: not run, for the reason beside it.
COMMANDS: dict[str, list[str] | None] = {
    "./launch/local.sh dqn_cartpole": [*TINY_CARTPOLE, *NO_VIDEO],
    "./launch/local.sh": [*TINY_MINITAUR, *NO_VIDEO],
    "./launch/local.sh dqn_cartpole --gin_bindings='train.num_iterations = 2000' --num_collect_actors=2 "
    "--root_dir=runs/short": [*TINY_CARTPOLE, *NO_VIDEO],
    ".venv/bin/actorlearner report runs/short": [],
    ".venv/bin/actorlearner video runs/short --num_episodes=1": [],
    ".venv/bin/tensorboard --logdir runs/short": ["--inspect"],  # the same reading, without the server
    ".venv/bin/actorlearner drill dqn_cartpole": None,  # test_drill.py does, with some of the faults
    ".venv/bin/actorlearner drill dqn_cartpole --kills=20": None,  # it takes ten minutes
    "docker compose -f docker/compose.yaml up": None,  # tests/deploy does
    "EXPERIMENT=dqn_cartpole COLLECT_ACTORS=4 docker compose -f docker/compose.yaml up": None,
    "docker compose -f docker/compose.yaml -f docker/compose.gpu.yaml up": None,  # it needs a GPU
    ".venv/bin/actorlearner replay-server dqn_cartpole --port=8008 --root_dir=runs/cartpole": TINY_CARTPOLE,
    ".venv/bin/actorlearner learner dqn_cartpole --replay_address=host1:8008 --root_dir=runs/cartpole": [
        *TINY_CARTPOLE,
        *NO_VIDEO,
    ],
    ".venv/bin/actorlearner collect-actor dqn_cartpole --replay_address=host1:8008 --root_dir=runs/cartpole "
    "--task=0": TINY_CARTPOLE,
    ".venv/bin/actorlearner collect-actor dqn_cartpole --replay_address=host1:8008 --root_dir=runs/cartpole "
    "--task=1": TINY_CARTPOLE,
    ".venv/bin/actorlearner eval-actor dqn_cartpole --replay_address=host1:8008": TINY_CARTPOLE,
    "./launch/bench.sh": None,  # it fetches two more frameworks; test_bench.py runs what it starts
    "./launch/bench.sh --only learner collect-cartpole": None,
    ".venv/bin/actorlearner bench --markdown=bench.json": None,
    "./tests/run.sh": None,  # it is what runs this
    "./tests/run.sh deploy": None,  # it needs a Docker engine
}
ROLES = ("replay-server", "learner", "collect-actor", "eval-actor")


def read_commands() -> list[str]:
    """Returns the lines of the README's bash blocks, with runs of spaces made one."""
    blocks = re.findall(r"```bash\n(.*?)```", (CHECKOUT / "README.md").read_text(), re.DOTALL)
    return [re.sub(r" +", " ", line.strip()) for block in blocks for line in block.splitlines() if line.strip()]


def test_every_command_of_the_readme_is_known_here():
    """A command that is never run does not work."""
    assert read_commands() == list(COMMANDS)


@pytest.mark.timeout(900)
def test_the_commands_of_the_readme_run_to_their_ends(tmp_path):
    """The stock distributed example's README names a deleted script and leaves out required flags."""
    if not (CHECKOUT / ".venv").is_dir():
        pytest.fail("there is no .venv: run this test through ./tests/run.sh, as the README says")
    port = find_free_port()
    under_way: list[tuple[str, Process]] = []

    def await_ends() -> None:
        try:
            for command, process in under_way:
                assert process.wait(RUN_SECS) == 0, f"{command}\n{process.output}"
        except AssertionError:  # what one waits for in vain, another may tell
            print(*(f"== {command}\n{process.abort()}" for command, process in under_way), sep="\n")
            raise
        under_way.clear()

    with Processes(tmp_path) as processes:
        for command, added in COMMANDS.items():
            if added is None:
                continue
            words = shlex.split(command.replace("host1:", "localhost:").replace("8008", str(port)))
            is_run = words[0] == "./launch/local.sh" or any(role in words for role in ROLES)  # none needs another's end
            if not is_run:
                await_ends()
            words[0] = str(CHECKOUT / words[0])
            under_way.append((command, processes.start_program(*words, *added)))
        await_ends()

    runs = tmp_path / "runs"
    assert len(list(runs.glob("dqn_cartpole-*/summary.json"))) == 1
    (path,) = runs.glob("sac_minitaur-*/summary.json")
    minitaur = json.loads(path.read_text())  # an experiment that is only ever run in full breaks unseen
    assert minitaur["train_steps"] == 20
    assert [evaluation["train_step"] for evaluation in minitaur["evaluations"]] == [0, 10, 20]
    assert all(0 < evaluation["average_episode_length"] <= 40 for evaluation in minitaur["evaluations"])
    assert minitaur["environment_crashes"] == 0
    assert (runs / "short" / "videos" / "trained_policy.mp4").is_file()
    assert (runs / "cartpole" / "learning_curve.png").is_file()
