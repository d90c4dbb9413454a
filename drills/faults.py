"""The drill's faults, by name.

Every fault is real: processes are killed, files damaged, connections cut, bytes sent to the port.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable

from actorlearner.run.status import read_ended_summary
from drills.damage import (
    change_experiment,
    change_settings,
    damage_checkpoints,
    diverge,
    fill_disk,
    make_read_only,
    observe_not_finite,
)
from drills.deaths import cut_power, kill_everything, kill_launcher, kill_role, stop, stop_twice
from drills.disturbances import break_network, insert_hostile, insert_stray, send_garbage, stall_role
from drills.drilled_run import Run
from drills.judging import Outcome, await_no_process, find_miscounts, find_ratio_error

END_SECS = 1_200.0


def await_end(run: Run, num_iterations: int) -> Outcome:
    """Waits for the end of training, and checks for missing results and leftovers."""
    outcome = Outcome("the end", train_step_before=run.status().get("train_step"))
    code = run.wait(END_SECS)
    if code:
        outcome.broken.append(f"exit code {code}")
    await_no_process(run, outcome, 2.0)
    summary = read_ended_summary(run.root_dir / "summary.json")
    if summary:
        outcome.train_step_after = summary["train_steps"]
        evaluated = [evaluation["train_step"] for evaluation in summary["evaluations"]]
        due = {*range(0, num_iterations, run.configured("train.eval_interval") or num_iterations), num_iterations}
        outcome.evaluations_lost = len(due - set(evaluated))
        if outcome.evaluations_lost or len(evaluated) != len(set(evaluated)):
            outcome.broken.append(f"evaluations of {sorted(due - set(evaluated))} are missing")
    if outcome.train_step_after != num_iterations:
        outcome.broken.append(f"no summary of {num_iterations} train steps")
    outcome.ratio_error = find_ratio_error(run.status())
    outcome.broken += find_miscounts(run, run.status())
    left = [path.name for path in run.temporary.iterdir()]
    left += [str(path) for path in run.root_dir.rglob("*") if path.name.endswith((".tmp", "_temp", ".new", ".old"))]
    with socket.socket() as client:
        if run.port() and not client.connect_ex(("localhost", run.port())):
            outcome.broken.append(f"port {run.port()} is still open")
    if left:
        outcome.broken.append(f"{len(left)} files left behind: {', '.join(sorted(left)[:3])} ...")
    return outcome


FAULTS: dict[str, Callable[[Run], Outcome]] = {
    "kill-learner": lambda run: kill_role(run, "learner-0"),
    "kill-replay-server": lambda run: kill_role(run, "replay-server-0"),
    "kill-collect-actor": lambda run: kill_role(run, "collect-actor-0"),
    "kill-eval-actor": lambda run: kill_role(run, "eval-actor-0"),
    "stop-learner": lambda run: kill_role(run, "learner-0", signal.SIGTERM),
    "stop-replay-server": lambda run: kill_role(run, "replay-server-0", signal.SIGTERM),
    "stop-collect-actor": lambda run: kill_role(run, "collect-actor-0", signal.SIGTERM),
    "stop-eval-actor": lambda run: kill_role(run, "eval-actor-0", signal.SIGTERM),
    "kill-learner-saving": lambda run: kill_role(run, "learner-0", while_saving=True),
    "kill-replay-server-saving": lambda run: kill_role(run, "replay-server-0", while_saving=True),
    "kill-learner-twice": lambda run: kill_role(run, "learner-0", again_at="restored "),
    "kill-replay-server-twice": lambda run: kill_role(run, "replay-server-0", again_at="serving replay"),
    "stall-learner": lambda run: stall_role(run, "learner-0"),
    "stall-replay-server": lambda run: stall_role(run, "replay-server-0"),
    "garbage": send_garbage,
    "stray-insert": insert_stray,
    "hostile-rows": insert_hostile,
    "kill-launcher": kill_launcher,
    "kill-everything": kill_everything,
    "power-cut": cut_power,
    "stop": stop,
    "interrupt": lambda run: stop(run, "SIGINT launcher", number=signal.SIGINT),
    "stop-twice": stop_twice,
    "damage-checkpoints": damage_checkpoints,
    "full-disk": fill_disk,
    "read-only-directory": make_read_only,
    "other-settings": change_settings,
    "other-experiment": change_experiment,
    "nan-observation": observe_not_finite,
    "diverge": diverge,
    "stall-network": lambda run: break_network(run, "stalled"),
    "lose-network": lambda run: break_network(run, "lost"),
    "cut-network": lambda run: break_network(run, "cut"),
}
NETWORK_FAULTS = {name for name in FAULTS if name.endswith("-network")}
