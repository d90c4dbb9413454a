"""Sweeps of real trainings: killed, stopped, gone on with; and a race on recorded results."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.processes import RUN_SECS, TINY, Process, Processes, bind, is_alive

SWEEP = (
    "sweep", "dqn_cartpole", "--root_dir=sweep", "--seeds=2", "--set", "dqn.n_step_update=1,2", "--jobs=2",
    *bind(*TINY, "train.num_iterations = 1_000"),  # long enough to be killed between its first evaluation and its end
)  # fmt: skip
VARIANTS = ("dqn.n_step_update=1", "dqn.n_step_update=2")


def _launchers(trial: Path) -> list[int]:
    """Returns the process ids of the launchers that a trial has had."""
    return [
        int(pid) for pid in re.findall(r"^--- .* process (\d+): ", (trial / "output.log").read_text(), re.MULTILINE)
    ]


@pytest.fixture(scope="module")
def killed_sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Process, int]]:
    """A sweep that was killed while the last trial of the first variant trained; then the same command once more."""
    folder = tmp_path_factory.mktemp("killed")
    with Processes(folder) as processes:
        first = processes.start(*SWEEP)
        first.await_line("update=1, seed 0: ended", RUN_SECS)
        first.await_line(r"update=1, seed 1: [\d.]+ at train step \d", RUN_SECS)
        first.send(signal.SIGKILL)
        again = processes.start(*SWEEP)
        yield folder / "sweep", again, again.wait(2 * RUN_SECS)


def test_a_killed_sweep_repeats_no_trial_that_ended(killed_sweep):
    """Hours of training would be done twice."""
    sweep, again, exit_code = killed_sweep
    assert exit_code == 0, again.output
    assert len(_launchers(sweep / VARIANTS[0] / "seed-0")) == 1
    assert "update=1, seed 0: starts" not in again.output and "update=1, seed 0: resumes" not in again.output


def test_a_killed_sweep_goes_on_with_the_trial_it_left_once_its_old_launcher_is_gone(killed_sweep):
    """Two learners in one run directory: the second is refused, and the trial counts as failed."""
    sweep, again, _ = killed_sweep
    trial = sweep / VARIANTS[0] / "seed-1"
    launchers = _launchers(trial)
    assert len(launchers) == 2 and not is_alive(launchers[0])
    assert "update=1, seed 1: resumes" in again.output and "update=1, seed 1: ended" in again.output
    assert "another learner" not in (trial / "output.log").read_text()
    summary = json.loads((trial / "summary.json").read_text())
    assert summary["has_ended"] and summary["seed"] == 1


def test_a_sweep_leaves_a_table_and_a_picture_with_every_seed_of_every_variant(killed_sweep):
    """Results that are only in run directories are not compared."""
    sweep, _, _ = killed_sweep
    table = (sweep / "sweep.md").read_text()
    for variant in VARIANTS:
        number = r"[\d.,]+"
        figures = rf"\| 2 \| {number} \| \*\*{number}\*\* \| {number} to {number} \|( {number} \|){{3}}$"
        assert re.search(rf"^\| {variant} {figures}", table, re.MULTILINE), table
    assert (sweep / "sweep.png").read_bytes().startswith(b"\x89PNG")
    states = json.loads((sweep / "sweep.json").read_text())["states"]
    assert states == {variant: {"0": "ended", "1": "ended"} for variant in VARIANTS}


def test_another_grid_on_the_same_folder_is_refused_and_told_what_differs(killed_sweep, processes):
    """A table half of which was trained with other settings compares nothing."""
    sweep, _, _ = killed_sweep
    before = (sweep / "sweep.json").read_text()
    other = processes.start(*SWEEP, "--gin_bindings=train.batch_size = 64", "--seeds=1", cwd=sweep.parent)
    assert other.wait(RUN_SECS) == 65
    assert "gin_bindings: the sweep has" in other.stderr and "seeds: the sweep has 1" in other.stderr
    assert (sweep / "sweep.json").read_text() == before


def test_a_stopped_sweep_stops_its_trials_and_says_how_to_go_on(processes, tmp_path):
    """Ctrl-C on a terminal, or a scheduler's SIGTERM, must leave no processes."""
    sweep = processes.start(*SWEEP)
    sweep.await_line("update=1, seed 0: starts", RUN_SECS)
    trial = tmp_path / "sweep" / VARIANTS[0] / "seed-0"
    sweep.send(signal.SIGTERM)
    assert sweep.wait(RUN_SECS) == 143, sweep.output
    assert "the same command continues" in sweep.output
    assert not any(is_alive(pid) for pid in _launchers(trial))


@pytest.fixture(scope="module")
def raced_sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Process, int]]:
    """A race of which most is recorded; the bad variant's third run would take hours, the good one's fourth fails."""
    folder = tmp_path_factory.mktemp("raced")
    for variant, num_ended, level in (("good", 3, 1000.0), ("bad", 2, 10.0)):
        for seed in range(num_ended):
            evaluations = [
                {"train_step": step, "environment_steps": 4 * step, "average_return": level + seed}
                for step in range(0, 500, 100)
            ]
            root_dir = folder / "sweep" / variant / f"seed-{seed}"
            root_dir.mkdir(parents=True)
            (root_dir / "summary.json").write_text(json.dumps({"has_ended": True, "evaluations": evaluations}))
    (folder / "sweep" / "good" / "seed-3").mkdir()
    (folder / "sweep" / "good" / "seed-3" / "logs").write_text("a file where the launcher needs a folder")
    with Processes(folder) as processes:
        sweep = processes.start(
            "sweep", "dqn_cartpole", "--root_dir=sweep", "--seeds=4", "--race", "--clock=train_step", "--jobs=1",
            "--variant=good:", "--variant=bad:", *bind(*TINY, "train.num_iterations = 10_000_000"),
        )  # fmt: skip
        yield folder / "sweep", sweep, sweep.wait(2 * RUN_SECS)


def test_a_race_stops_the_trial_of_a_beaten_variant_and_starts_no_more_of_it(raced_sweep):
    """Hopeless variants take as long as good ones, unless they are stopped."""
    sweep, process, _ = raced_sweep
    assert re.search(r"bad: beaten at step \d00: -9\d\d", process.output), process.output
    assert "bad, seed 2: stopped because its variant is beaten" in process.output
    assert not is_alive(_launchers(sweep / "bad" / "seed-2")[0])
    assert not (sweep / "bad" / "seed-3").exists()
    table = (sweep / "sweep.md").read_text()
    assert re.search(r"^\* bad, seed 2: beaten at step \d00: .* against good, 3 seeds$", table, re.MULTILINE), table


def test_a_trial_that_fails_is_in_the_table_with_its_reason_and_in_the_exit_code(raced_sweep):
    """A mean of those that went well is what everybody reads."""
    sweep, process, exit_code = raced_sweep
    assert exit_code == 1, process.output
    table = (sweep / "sweep.md").read_text()
    assert re.search(r"^\| good \| 3 \| .*\| failed \|$", table, re.MULTILINE), table
    reason = r"^\* good, seed 3: failed: exit code 73, error: --root_dir=.* cannot hold a run"
    assert re.search(reason, table, re.MULTILINE), table
