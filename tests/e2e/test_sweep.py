"""Sweeps of real trainings: killed, stopped, gone on with; and a race on recorded results."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.processes import RUN_SECS, TINY, Process, Processes, bind, is_alive

DIVERGING = "diverging: dqn.learning_rate = 1e30; dqn.final_learning_rate = 1e30"
SWEEP = (
    "sweep", "dqn_cartpole", "--root_dir=sweep", "--seeds=2", "--variant=plain:", f"--variant={DIVERGING}", "--jobs=2",
    *bind(*TINY),
)  # fmt: skip


def _starts(folder: Path, variant: str, seed: int) -> list[int]:
    """Returns the process ids of the launchers that a trial has had."""
    output = folder / "sweep" / variant / f"seed-{seed}" / "output.log"
    return [int(pid) for pid in re.findall(r"^--- .* process (\d+): ", output.read_text(), re.MULTILINE)]


@pytest.fixture(scope="module")
def killed_sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Process, int, list[int]]]:
    """A sweep that was killed while its last good trial trained, given again with the same command."""
    folder = tmp_path_factory.mktemp("killed")
    with Processes(folder) as processes:
        first = processes.start(*SWEEP)
        first.await_line("plain, seed 0: ended", RUN_SECS)
        first.await_line("plain, seed 1: begins", RUN_SECS)
        first.await_line(r"plain, seed 1: [\d.]+ at train step 0", RUN_SECS)
        killed = _starts(folder, "plain", 1)
        first.send(signal.SIGKILL)
        again = processes.start(*SWEEP)
        yield folder, again, again.wait(2 * RUN_SECS), killed


def test_a_killed_sweep_repeats_no_trial_that_ended(killed_sweep):
    """Hours of training would be done twice."""
    folder, again, _, _ = killed_sweep
    assert len(_starts(folder, "plain", 0)) == 1
    assert "plain, seed 0: begins" not in again.output


def test_a_killed_sweep_goes_on_with_the_trial_it_left_once_its_old_launcher_is_gone(killed_sweep):
    """Two learners in one run directory: the second is refused, and the trial counts as failed."""
    folder, again, _, killed = killed_sweep
    assert "plain, seed 1: goes on" in again.output and "plain, seed 1: ended" in again.output
    assert len(_starts(folder, "plain", 1)) == 2
    assert not any(is_alive(pid) for pid in killed)
    summary = json.loads((folder / "sweep" / "plain" / "seed-1" / "summary.json").read_text())
    assert summary["has_ended"] and summary["seed"] == 1


def test_a_trial_that_fails_is_in_the_table_with_its_reason_and_in_the_exit_code(killed_sweep):
    """A mean of those that went well is what everybody reads."""
    folder, again, exit_code, _ = killed_sweep
    assert exit_code == 1, again.output
    table = (folder / "sweep" / "sweep.md").read_text()
    assert re.search(r"^\| diverging \| 0 \| (- \| ){4}failed \| failed \|$", table, re.MULTILINE), table
    assert re.search(r"^\* diverging, seed 1: failed: exit code 65, .*diverged", table, re.MULTILINE), table


def test_a_sweep_leaves_a_table_and_a_picture_of_what_ended(killed_sweep):
    """Half of the seeds may fail, the other half's results are what the day was spent on."""
    folder, _, _, _ = killed_sweep
    table = (folder / "sweep" / "sweep.md").read_text()
    assert re.search(r"^\| plain \| 2 \| [\d.]+ \| \*\*[\d.]+\*\* \| [\d.]+ to [\d.]+ \|", table, re.MULTILINE), table
    assert (folder / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((folder / "sweep" / "sweep.json").read_text())
    assert content["states"]["plain"] == {"0": "ended", "1": "ended"}


def test_another_grid_on_the_same_folder_is_refused_and_told_what_differs(killed_sweep, processes):
    """A table half of which was trained with other settings compares nothing."""
    folder, _, _, _ = killed_sweep
    before = (folder / "sweep" / "sweep.json").read_text()
    other = processes.start(*SWEEP, "--gin_bindings=train.batch_size = 64", "--seeds=1", cwd=folder)
    assert other.wait(RUN_SECS) == 65
    assert "gin_bindings: the sweep has" in other.stderr and "seeds: the sweep has 1" in other.stderr
    assert (folder / "sweep" / "sweep.json").read_text() == before


def test_a_stopped_sweep_stops_its_trials_which_save(processes, tmp_path):
    """Ctrl-C on a terminal, or a scheduler's SIGTERM, must leave neither processes nor lost minutes."""
    sweep = processes.start(*SWEEP[: -len(bind(*TINY))], *bind(*TINY, "train.num_iterations = 50_000"), "--seeds=7,")
    sweep.await_line("plain, seed 7: begins", RUN_SECS)
    (launcher,) = _starts(tmp_path, "plain", 7)
    run = tmp_path / "sweep" / "plain" / "seed-7"
    sweep.await_line(r"plain, seed 7: [\d.]+ at train step 0", RUN_SECS)
    sweep.send(signal.SIGTERM)
    assert sweep.wait(60) == 143, sweep.output
    assert "the same command goes on" in sweep.output
    assert not is_alive(launcher)
    assert "stopped by SIGTERM" in (run / "output.log").read_text()
    assert "not ended: at train step" in (tmp_path / "sweep" / "sweep.md").read_text()


def test_a_race_starts_no_trial_of_a_variant_that_recorded_results_have_beaten(processes, tmp_path):
    """The fourth and fifth seed of a hopeless variant take as long as those of a good one."""
    levels = {"good": (range(4), 10.0), "bad": (range(3), 1.0)}
    for variant, (seeds, level) in levels.items():
        for seed in seeds:
            evaluations = [
                {"train_step": step, "environment_steps": 4 * step, "average_return": level * step + seed}
                for step in range(0, 500, 100)
            ]
            root_dir = tmp_path / "sweep" / variant / f"seed-{seed}"
            root_dir.mkdir(parents=True)
            (root_dir / "summary.json").write_text(json.dumps({"has_ended": True, "evaluations": evaluations}))
    sweep = processes.start(
        "sweep", "dqn_cartpole", "--root_dir=sweep", "--seeds=4", "--variant=good:", "--variant=bad: dqn.gamma = 0.1",
        "--race",
    )  # fmt: skip
    assert sweep.wait(RUN_SECS) == 0, sweep.output
    assert "bad: beaten at step 1,600" in sweep.output and "begins" not in sweep.output
    assert "* bad, seed 3: beaten at step 1,600" in (tmp_path / "sweep" / "sweep.md").read_text()
