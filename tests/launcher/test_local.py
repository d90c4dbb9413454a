"""The local launcher, with real processes: small scripts play the roles, so no test waits for TensorFlow."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

import actorlearner

DEADLINE_SECS = 10.0  # of every wait; a test that holds does not come near it
SOURCE_ROOT = Path(actorlearner.__file__).parent.parent

# Plays whichever role it is started as: what a test wrote for that role, or else "run until SIGTERM".
PLAYER = """
import os, pathlib, signal, subprocess, sys, time

kind, experiment = sys.argv[1:3]
flags = dict(flag.partition("=")[::2] for flag in sys.argv[3:])
task = flags["--task"]
root_dir = pathlib.Path(flags["--root_dir"])
events = root_dir / "events"

def note(word, *rest):
    with open(events, "ab", buffering=0) as f:
        f.write((" ".join([kind, task, word, *map(str, rest)]) + chr(10)).encode())

def noted(line):
    return line in events.read_text().splitlines()

def num_starts():
    return sum(line.startswith(f"{kind} {task} started") for line in events.read_text().splitlines())

def wait_for(condition):
    while not condition():
        time.sleep(0.01)

def log(message):
    print("I 12:34:56", message)

def write_status(**fields):
    import json
    fields = {"phase": "training", "train_step": 0, "num_iterations": 100, "time": time.time(), **fields}
    (root_dir / "status.tmp").write_text(json.dumps(fields))
    os.replace(root_dir / "status.tmp", root_dir / "status.json")

def if_first(error):
    if num_starts() == 1:
        raise error

def on_sigterm(number, frame):
    note("stopped")
    os._exit(143)

signal.signal(signal.SIGTERM, on_sigterm)
note("started", os.getpid())
exec((pathlib.Path(__file__).parent / "parts" / kind).read_text())
wait_for(lambda: False)
"""

LAUNCH = """
import json, pathlib, signal, sys
from actorlearner.launcher import local
from actorlearner.launcher.options import LocalOptions
from actorlearner.launcher.restarts import Timing
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may be ignoring it, as under nohup
options = json.loads(sys.argv[1])
timing = Timing(**options.pop("timing"))
options["root_dir"] = pathlib.Path(options["root_dir"])
sys.exit(local.run_local(LocalOptions(timing=timing, **{
    k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})))
"""

QUICK = {
    "poll_secs": 0.02,
    "first_restart_secs": 0.05,
    "longest_restart_secs": 0.1,
    "end_by_themselves_secs": 0.2,
    "live_interval_secs": 0.05,
    "plain_interval_secs": 0.1,
}


def wait_until(condition, what: str):
    """Polls `condition()` until it is true, and returns its result."""
    deadline = time.monotonic() + DEADLINE_SECS
    while time.monotonic() < deadline:
        result = condition()
        if result:
            return result
        time.sleep(0.01)
    pytest.fail(f"{what} did not happen within {DEADLINE_SECS} s")


class Launch:
    """A launcher in a process of its own, and what became of it."""

    def __init__(self, tmp_path: Path):
        self.tmp_path = tmp_path
        self.root_dir = tmp_path / "run"
        self.mark = f"LAUNCH_TEST={uuid.uuid4().hex}"  # in the environment of everything it starts
        self.stdout, self.stderr = "", ""
        self._threads: list[threading.Thread] = []

    def start(self, parts: dict[str, str] | None = None, timing: dict | None = None, stdout=None, **options) -> Launch:
        """Starts the launcher; `parts` says in Python what each role does before it waits for SIGTERM."""
        (self.tmp_path / "player.py").write_text(PLAYER)
        (self.tmp_path / "parts").mkdir(exist_ok=True)
        for kind in ("replay-server", "learner", "eval-actor", "collect-actor"):
            (self.tmp_path / "parts" / kind).write_text((parts or {}).get(kind, ""))
        fields = {
            "experiment": "some_experiment",
            "root_dir": str(self.root_dir),
            "command": [sys.executable, "-S", str(self.tmp_path / "player.py")],
            "timing": {**QUICK, **(timing or {})},
            **options,
        }
        name, value = self.mark.split("=")
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, json.dumps(fields)],
            env={**os.environ, "PYTHONPATH": str(SOURCE_ROOT), "TERM": "xterm", name: value},
            stdout=subprocess.PIPE if stdout is None else stdout,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for stream in ("stdout", "stderr"):
            if getattr(self.process, stream) is not None:
                thread = threading.Thread(target=self._collect, args=(stream,), daemon=True)
                thread.start()
                self._threads.append(thread)
        return self

    def _collect(self, stream: str) -> None:
        for line in getattr(self.process, stream):
            setattr(self, stream, getattr(self, stream) + line)

    def finish(self) -> int:
        """Returns the launcher's exit code, all its output read; nothing it started may be left."""
        returncode = self.process.wait(DEADLINE_SECS)
        for thread in self._threads:
            thread.join(DEADLINE_SECS)
        assert self.survivors() == []
        return returncode

    def events(self) -> list[str]:
        try:
            return (self.root_dir / "events").read_text().splitlines()
        except FileNotFoundError:
            return []

    def words(self, word: str) -> list[str]:
        """Returns the roles that noted `word`, in order, as `learner-0`."""
        return ["-".join(line.split()[:2]) for line in self.events() if line.split()[2] == word]

    def pids(self, role: str, num_starts: int = 1) -> list[int]:
        """Returns the process ids of a role's lives once it has begun `num_starts` of them."""

        def find() -> list[int]:
            lines = [line.split() for line in self.events()]
            return [int(line[3]) for line in lines if line[2] == "started" and "-".join(line[:2]) == role]

        wait_until(lambda: len(find()) >= num_starts, f"start {num_starts} of {role}")
        return find()

    def wait_for_all(self, num_roles: int = 4) -> None:
        wait_until(lambda: len(self.words("started")) >= num_roles, f"start of {num_roles} roles")

    def go(self, num_roles: int = 4) -> None:
        """Lets roles go on that wait for `noted("go 0 now")`, when all have started: to be stopped one must have."""
        self.wait_for_all(num_roles)
        with open(self.root_dir / "events", "a") as f:
            f.write("go 0 now\n")

    def wait_for_output(self, text: str) -> None:
        wait_until(lambda: text in self.stdout, f"{text!r} in the merged stream")

    def log(self, role: str) -> str:
        return (self.root_dir / "logs" / f"{role}.log").read_text()

    def survivors(self) -> list[int]:
        """Returns the living processes that carry this launch's mark."""
        found = []
        for directory in Path("/proc").iterdir():
            try:
                if self.mark.encode() in (directory / "environ").read_bytes().split(b"\0"):
                    found.append(int(directory.name))
            except (OSError, ValueError):  # not a process, not ours, or gone
                continue
        return found


@pytest.fixture
def launch(tmp_path):
    launch = Launch(tmp_path)
    yield launch
    for pid in launch.survivors():
        os.kill(pid, signal.SIGKILL)
    launch.process.wait(DEADLINE_SECS)
    for stream in (launch.process.stdout, launch.process.stderr):
        if stream is not None:
            stream.close()


# --- Starting ---------------------------------------------------------------------------------------------------------


def test_launcher_starts_without_the_heavy_imports():
    """TensorFlow alone takes longer to import than the roles may take to be started."""
    heavy = ("tensorflow", "reverb", "tf_agents", "gin", "numpy")
    program = f"import sys, actorlearner.launcher.local; print([name for name in {heavy} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE_ROOT)}
    assert subprocess.check_output([sys.executable, "-c", program], env=environment, text=True).strip() == "[]"


def test_root_dir_that_cannot_be_made_is_said_before_anything_starts(launch):
    launch.root_dir = launch.tmp_path / "file" / "run"
    (launch.tmp_path / "file").write_text("")
    assert launch.start().finish() == 73
    assert launch.stderr.startswith(f"error: --root_dir={launch.root_dir} ")


def test_a_taken_port_moves_all_roles_to_another(launch):
    """Roles left on the first port would wait for a replay server that is not there."""
    launch.start(
        {
            "replay-server": "note('port', flags['--port']); sys.exit(69) if num_starts() == 1 else None",
            "learner": "note('address', flags['--replay_address'])",
            "collect-actor": "note('address', flags['--replay_address'])",
        }
    )
    wait_until(lambda: len(launch.words("port")) == 2, "a second port")
    second = [line.split()[3] for line in launch.events() if line.split()[2] == "port"][1]
    for role in ("learner", "collect-actor"):
        wait_until(lambda role=role: f"{role} 0 address 127.0.0.1:{second}" in launch.events(), f"{role} on {second}")
    launch.process.terminate()
    assert launch.finish() == 143


def test_each_of_several_replay_servers_is_started_again_by_itself_and_all_are_stopped_last(launch):
    """The other holds half of the replay, and must not be touched."""
    launch.start(num_replay_servers=2)
    launch.wait_for_all(5)
    os.kill(launch.pids("replay-server-1")[0], signal.SIGKILL)
    launch.pids("replay-server-1", num_starts=2)
    launch.wait_for_output("replay-server-1 was killed by SIGKILL; restarting it")
    assert len(launch.words("started")) == 6
    launch.process.terminate()
    assert launch.finish() == 143
    assert sorted(launch.words("stopped")[3:]) == ["replay-server-0", "replay-server-1"]


# --- The end ----------------------------------------------------------------------------------------------------------


def test_when_training_ends_the_others_are_stopped_and_the_replay_server_last(launch):
    """An actor whose replay server goes first ends with an error that is none."""
    summary = {
        "delivered": {
            "train_step": 9000,
            "average_return": 2987.5,
            "average_episode_length": 2987.5,
            "min_episode_length": 2500,
            "num_episodes": 20,
        }
    }
    launch.start(
        {
            "learner": f"""
wait_for(lambda: noted("go 0 now"))
(root_dir / "summary.json").write_text({json.dumps(summary)!r})
sys.exit(0)"""
        },
        num_collect_actors=2,
    )
    launch.go(5)
    assert launch.finish() == 0
    stopped = launch.words("stopped")
    assert sorted(stopped[:3]) == ["collect-actor-0", "collect-actor-1", "eval-actor-0"]
    assert stopped[3:] == ["replay-server-0"]
    assert f"training ended; the run is in {launch.root_dir}" in launch.stdout
    assert "delivered policy of train step 9,000: average return 2,987.5" in launch.stdout
    assert launch.stderr == ""


def test_actors_that_end_by_themselves_are_not_signalled(launch):
    """The eval actor may still be writing its last evaluation when the learner is done."""
    actor = "wait_for(lambda: noted('learner 0 over')); note('done'); sys.exit(0)"
    launch.start(
        {
            "learner": "wait_for(lambda: noted('go 0 now')); note('over'); sys.exit(0)",
            "eval-actor": actor,
            "collect-actor": actor,
        },
        timing={"end_by_themselves_secs": DEADLINE_SECS},
    )
    launch.go()
    assert launch.finish() == 0
    assert sorted(launch.words("done")) == ["collect-actor-0", "eval-actor-0"]
    assert launch.words("stopped") == ["replay-server-0"]


def test_an_actor_that_ends_after_training_is_not_started_again(launch):
    """Its next life would only find out that training is over, again and again, until it is given up."""
    launch.start(
        {
            "learner": "write_status(phase='final evaluation'); note('final'); "
            "wait_for(lambda: noted('eval-actor 0 done') and noted('go 0 now')); time.sleep(0.3); sys.exit(0)",
            "eval-actor": "wait_for(lambda: noted('collect-actor 0 done')); note('done'); sys.exit(0)",
            "collect-actor": "wait_for(lambda: noted('learner 0 final')); note('done'); sys.exit(0)",
        }
    )
    launch.go()
    assert launch.finish() == 0
    assert len(launch.words("started")) == 4


def test_an_actor_that_is_told_of_an_end_reached_before_is_not_started_again(launch):
    """The learner of an ended run writes no status: it announces the end, and the others may exit before it does."""
    launch.root_dir.mkdir()
    (launch.root_dir / "summary.json").write_text('{"has_ended": true}')
    launch.start(
        {
            "learner": "wait_for(lambda: noted('collect-actor 0 done') and noted('go 0 now')); "
            "time.sleep(0.3); sys.exit(0)",
            "collect-actor": "note('done'); sys.exit(0)",
        }
    )
    launch.go()
    assert launch.finish() == 0
    assert "restarting it" not in launch.stdout + launch.stderr
    assert len(launch.words("started")) == 4


# --- Restarting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["collect-actor-0", "eval-actor-0", "learner-0", "replay-server-0"])
def test_a_killed_role_is_started_again(launch, role):
    launch.start()
    launch.wait_for_all()
    os.kill(launch.pids(role)[0], signal.SIGKILL)
    first, second = launch.pids(role, num_starts=2)
    assert first != second
    launch.wait_for_output("was killed by SIGKILL; restarting it")
    assert len(launch.words("started")) == 5, "the others must not be touched"
    launch.process.terminate()
    assert launch.finish() == 143


def test_an_actor_that_ends_before_training_does_is_started_again(launch):
    launch.start({"collect-actor": "sys.exit(0) if num_starts() == 1 else None", "learner": "write_status()"})
    launch.pids("collect-actor-0", num_starts=2)
    launch.process.terminate()
    assert launch.finish() == 143


def test_a_role_that_keeps_crashing_is_given_up(launch):
    """Restarting forever would look like training."""
    launch.start(
        {"collect-actor": "print('noise'); wait_for(lambda: noted('go 0 now')); raise RuntimeError('no such joint')"},
        timing={"num_short_lives": 3},
    )
    launch.go()
    assert launch.finish() == 1
    assert launch.words("started").count("collect-actor-0") == 3
    assert launch.stderr.startswith("error: collect-actor-0 crashed with exit code 1, 3 times in a row")
    assert str(launch.root_dir / "logs" / "collect-actor-0.log") in launch.stderr
    assert "RuntimeError: no such joint" in launch.stderr
    assert launch.words("stopped")[-1] == "replay-server-0"


def test_an_unreachable_peer_is_a_reason_to_try_again(launch):
    launch.start(
        {"collect-actor": "if num_starts() == 1: print('error: no replay server within 60 s'); sys.exit(69)"},
    )
    launch.pids("collect-actor-0", num_starts=2)
    launch.wait_for_output("collect-actor-0 | error: no replay server within 60 s")
    launch.process.terminate()
    assert launch.finish() == 143


def test_a_crash_shows_its_last_lines_and_none_of_them_twice(launch):
    """The traceback is what a person needs, and it is not in the roles' log format."""
    launch.start({"collect-actor": "log('hello'); if_first(RuntimeError('no such joint'))"})
    launch.wait_for_output("collect-actor-0 crashed with exit code 1; restarting it")
    before_the_restart = launch.stdout[: launch.stdout.index("crashed")]
    assert before_the_restart.count("collect-actor-0 | I 12:34:56 hello") == 1
    assert "collect-actor-0 | RuntimeError: no such joint\n" in before_the_restart
    launch.process.terminate()
    assert launch.finish() == 143


def test_a_role_that_hangs_is_started_again_and_its_stacks_are_pointed_to(launch):
    """Its last lines are the outermost frames, which do not show where it hangs."""
    hangs_once = "import faulthandler; num_starts() == 1 and faulthandler.dump_traceback_later(0.2, exit=True)"
    launch.start({"collect-actor": hangs_once})
    launch.wait_for_output("collect-actor-0 crashed with exit code 1; restarting it")
    assert 'collect-actor-0 hung (see --hang_secs): its log has the stack of every thread' in launch.stdout
    assert "most recent call first" not in launch.stdout
    launch.process.terminate()
    assert launch.finish() == 143


@pytest.mark.parametrize("role, num_lives", [("eval-actor", 2), ("replay-server", 2), ("collect-actor", 1)])
def test_who_is_killed_in_the_final_evaluation_is_started_again_if_needed_for_it(launch, role, num_lives):
    """The learner would wait half an hour for a result that no process is left to deliver."""
    launch.start({"learner": "write_status(phase='final evaluation'); note('final')"})
    launch.wait_for_all()
    wait_until(lambda: "learner-0" in launch.words("final"), "the final evaluation")
    os.kill(launch.pids(f"{role}-0")[0], signal.SIGKILL)
    launch.wait_for_output("was killed by SIGKILL")
    launch.pids(f"{role}-0", num_starts=num_lives)
    launch.process.terminate()
    assert launch.finish() == 143
    assert launch.words("started").count(f"{role}-0") == num_lives


# --- Errors that starting again cannot cure ---------------------------------------------------------------------------


@pytest.mark.parametrize("code", [64, 65, 73, 75])
def test_an_error_all_roles_find_is_shown_once_and_its_code_returned(launch, code):
    """Four copies of one message hide it."""
    part = (
        f"log('reading'); print('error: no such binding: tran.gamma\\n  did you mean train.gamma?'); sys.exit({code})"
    )
    launch.start(dict.fromkeys(("replay-server", "learner", "eval-actor", "collect-actor"), part))
    assert launch.finish() == code
    assert launch.stderr == "error: no such binding: tran.gamma\n  did you mean train.gamma?\n"
    assert "error:" not in launch.stdout
    assert len(launch.words("started")) <= 4


def test_a_final_code_without_a_message_still_says_where_to_look(launch):
    launch.start({"learner": "sys.exit(75)"})
    assert launch.finish() == 75
    assert launch.stderr.startswith("error: learner ended with exit code 75: another learner holds this run; see ")


# --- Being stopped ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_stops_all_roles_in_order_and_lets_the_learner_save(launch, number, code):
    launch.start(
        {
            "learner": """
def save_and_exit(number, frame):
    time.sleep(0.3)
    note("saved")
    note("stopped")
    os._exit(143)
signal.signal(signal.SIGTERM, save_and_exit)
write_status(train_step=41)
note("ready")"""
        },
        timing={"second_signal_secs": DEADLINE_SECS},
    )
    launch.wait_for_all()
    wait_until(lambda: launch.words("ready"), "the learner's handler")
    launch.process.send_signal(number)
    launch.wait_for_output("stopping all roles")
    launch.process.send_signal(number)  # the same one again: `timeout` and some shells deliver theirs twice
    assert launch.finish() == code
    assert launch.words("saved") == ["learner-0"]
    stopped = launch.words("stopped")
    assert sorted(stopped[:2]) == ["collect-actor-0", "eval-actor-0"]
    assert stopped[2:] == ["learner-0", "replay-server-0"]
    assert f"stopped by {number.name} at 41 of 100 train steps (41%)" in launch.stdout
    assert "killing" not in launch.stdout


def test_a_second_signal_kills_what_will_not_stop(launch):
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); note('deaf')"
    launch.start(dict.fromkeys(("replay-server", "learner", "collect-actor"), deaf), timing={"second_signal_secs": 0})
    wait_until(lambda: len(launch.words("deaf")) == 3, "three deaf roles")
    launch.process.send_signal(signal.SIGINT)
    launch.wait_for_output("stopping all roles")
    started = time.monotonic()
    launch.process.send_signal(signal.SIGINT)
    assert launch.finish() == 130
    assert time.monotonic() - started < 5, "the least of the patiences is 10 s"
    # The eval actor is not deaf, and named as well if it had no time to end.
    assert re.search(r"killing [^:]*collect-actor-0[^:]*: a second signal", launch.stdout)


def test_a_role_that_will_not_stop_is_killed_when_its_time_is_up(launch):
    launch.start(
        {"learner": "signal.signal(signal.SIGTERM, signal.SIG_IGN); note('deaf')"}, timing={"stop_learner_secs": 0.3}
    )
    wait_until(lambda: launch.words("deaf"), "a deaf learner")
    launch.wait_for_all()
    launch.process.terminate()
    assert launch.finish() == 143
    assert "killing learner: no exit within 0.3 s of SIGTERM" in launch.stdout


def test_replay_servers_have_what_the_others_left_of_the_time_to_stop(launch):
    """A large replay takes longer to save than the rest together."""
    saves = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(2), note('saved'), sys.exit(143)))"
    launch.start({"replay-server": saves}, timing={"stop_actors_secs": 0.5, "stop_learner_secs": 0.5, "stop_secs": 10})
    launch.wait_for_all()
    launch.process.terminate()
    assert launch.finish() == 143
    assert launch.words("saved") == ["replay-server-0"]
    assert "killing" not in launch.stdout


def test_nothing_outlives_a_killed_launcher(launch):
    """Not even what a role started itself; a left-over learner would keep writing the run directory."""
    launch.start(
        {
            "learner": """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "1000"])
note("child", child.pid)"""
        }
    )
    launch.wait_for_all()
    wait_until(lambda: launch.words("child"), "the learner's own child")
    assert len(launch.survivors()) == 7, "launcher, guard, four roles, one child"
    launch.process.kill()
    wait_until(lambda: not launch.survivors(), "the end of all processes")


def test_roles_end_with_a_killed_launcher_even_when_its_guard_is_gone(launch):
    """A user who kills processes by hand may hit both."""
    launch.start()
    launch.wait_for_all()
    roles = [int(line.split()[3]) for line in launch.events()]
    (guard,) = set(launch.survivors()) - {launch.process.pid, *roles}
    os.kill(guard, signal.SIGKILL)
    launch.process.kill()
    wait_until(lambda: not launch.survivors(), "the end of all processes")


def test_what_a_role_started_ends_with_the_role(launch):
    """An orphaned ffmpeg would hold the pipe open and the launcher waiting."""
    launch.start({"learner": "note('child', subprocess.Popen(['sleep', '1000']).pid); sys.exit(0)"})
    assert launch.finish() == 0
    assert launch.words("child") == ["learner-0"]


# --- What is shown ----------------------------------------------------------------------------------------------------


def test_noise_goes_to_the_log_alone(launch):
    """TensorFlow prints dozens of lines at every start; a person looks for the few that matter."""
    launch.start(
        {
            "collect-actor": """
print("2026-01-01 00:00:00.000000: I tensorflow/core/platform/cpu_feature_guard.cc:182] This TensorFlow binary")
print("UserWarning: noise", file=sys.stderr)
log("waiting for [the] replay server at 127.0.0.1:4444")
os.write(1, bytes([0xff, 0x1b]) + b"raw bytes" + b"x" * 200000 + b"\\n")
log("done")"""
        },
        num_collect_actors=2,
    )
    for task in (0, 1):
        launch.wait_for_output(f"collect-actor-{task} | I 12:34:56 waiting for [the] replay server at 127.0.0.1:4444\n")
        launch.wait_for_output(f"collect-actor-{task} | I 12:34:56 done\n")
    launch.process.terminate()
    assert launch.finish() == 143
    for noise in ("tensorflow", "UserWarning", "raw bytes"):
        assert noise not in launch.stdout
    log = (launch.root_dir / "logs" / "collect-actor-1.log").read_bytes()
    for kept in (b"cpu_feature_guard.cc", b"UserWarning: noise", b"raw bytes" + b"x" * 200000, b"I 12:34:56 done\n"):
        assert kept in log


def test_the_log_keeps_every_life_of_a_role(launch):
    launch.start({"eval-actor": "log(f'life {num_starts()}'); sys.exit(1) if num_starts() == 1 else None"})
    launch.wait_for_output("life 2")
    launch.process.terminate()
    assert launch.finish() == 143
    log = launch.log("eval-actor-0")
    assert log.index("life 1") < log.index("life 2")
    assert log.count("--- ") == 2, "a heading with the command line for each"


def test_an_error_of_a_role_that_hangs_is_shown_all_the_same(launch):
    launch.start({"learner": "print('error: out of memory')"}, timing={"old_error_secs": 0.1})
    launch.wait_for_output("learner         | error: out of memory")
    launch.process.terminate()
    assert launch.finish() == 143


def test_status_is_a_plain_line_without_a_terminal_and_not_repeated(launch):
    launch.start({"learner": "write_status(train_step=41, time=time.time() + 60); note('written')"})
    launch.wait_for_output("status          | training: 41 of 100 train steps (41%); 0 environment steps\n")
    time.sleep(0.5)  # five more chances to print it
    launch.process.terminate()
    assert launch.finish() == 143
    assert launch.stdout.count("status          | training: 41 of 100") == 1
    assert "\x1b" not in launch.stdout


def test_status_is_a_live_line_on_a_terminal(launch):
    ours, theirs = pty.openpty()
    launch.start({"learner": "log('hello'); write_status(train_step=41, train_steps_per_sec=193.4)"}, stdout=theirs)
    os.close(theirs)
    seen = b""

    def read(*wanted: bytes) -> bool:
        nonlocal seen
        if select.select([ours], [], [], 0.1)[0]:
            seen += os.read(ours, 1 << 16)
        return all(text in seen for text in wanted)

    wait_until(lambda: read(b"I 12:34:56 hello", b"41 of 100 train steps (41%), 193/s", b"\x1b["), "the live line")
    launch.process.terminate()
    wait_until(lambda: read(b"stopped by SIGTERM at 41 of 100", b"to resume"), "the last line")
    assert launch.finish() == 143
    os.close(ours)


def test_a_reader_that_goes_away_does_not_end_training(launch):
    """`actorlearner train ... | head` must not lose a night's run."""
    reading, writing = os.pipe()
    os.close(reading)
    launch.start({"learner": "log('hello'); time.sleep(0.3); log('again'); sys.exit(0)"}, stdout=writing)
    os.close(writing)
    assert launch.finish() == 0
    assert launch.stderr == ""
    assert "again" in launch.log("learner-0")
