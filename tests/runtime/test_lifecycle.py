"""Waits end, and processes say why they did."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

import actorlearner
from actorlearner.runtime.lifecycle import ExitCode, RoleError, Stop, Stopped, wait_until

SOURCE_ROOT = Path(actorlearner.__file__).parent.parent


def _wait(poll, *, stop=None, deadline_secs=5.0, clock=None):
    return wait_until(
        poll,
        lambda: "the learner at host:1",
        stop=stop or Stop(),
        deadline_secs=deadline_secs,
        setting="--peer_patience_secs",
        every_secs=0.0,
        clock=clock or itertools.count().__next__,
    )


def test_a_wait_returns_the_first_result_of_its_poll():
    """Zero and the empty string are results; only None and False mean "not yet"."""
    answers = iter([None, False, 0])
    assert _wait(lambda: next(answers)) == 0


def test_a_wait_gives_up_at_its_deadline_and_names_peer_and_setting():
    """A role that waits for a dead peer without end looks like a slow one."""
    polls = []
    with pytest.raises(RoleError) as raised:
        _wait(lambda: polls.append(1), deadline_secs=5.0)
    assert raised.value.exit_code == ExitCode.UNAVAILABLE
    assert "waited 6 s for the learner at host:1, longer than --peer_patience_secs = 5 s" in str(raised.value)
    assert len(polls) == 6  # at seconds 1 to 6


def test_a_wait_polls_once_more_when_the_deadline_has_passed():
    """A process that was suspended would give up on a peer that has long been there."""
    assert _wait(lambda: "there", deadline_secs=0.0, clock=iter([0.0, 1000.0]).__next__) == "there"


def test_a_wait_says_every_half_minute_what_it_waits_for(caplog):
    """Without it a user sees a role that does nothing."""
    caplog.set_level("INFO")
    with pytest.raises(RoleError):
        _wait(lambda: None, deadline_secs=100.0, clock=itertools.count(step=10).__next__)
    assert len(caplog.messages) == 3
    assert caplog.messages[0] == "waiting for the learner at host:1 (30 s)"


def test_stop_ends_a_wait():
    """SIGTERM during a wait of minutes would end in SIGKILL, without a checkpoint."""
    stop = Stop()
    stop.set()
    with pytest.raises(Stopped, match="the learner at host:1"):
        _wait(lambda: None, stop=stop)


def test_stop_without_a_signal_counts_as_terminated():
    """A launcher must not take a stopped role for one that reached the end."""
    stop = Stop()
    assert not stop.is_set()
    stop.set()
    assert stop.is_set()
    assert stop.wait(0)
    assert stop.exit_code == ExitCode.TERMINATED == 143


@pytest.mark.parametrize(
    ("code", "exit_code", "written"),
    [(ExitCode.DATA, 0, "65\n"), (ExitCode.UNAVAILABLE, 69, None), (ExitCode.DONE, 0, None)],
)
def test_a_final_code_goes_into_a_file_for_who_would_start_again(tmp_path, code, exit_code, written):
    """Docker knows two endings: what ends with 0, and what is started again, for hours, with wrong settings."""
    path = tmp_path / "code"
    script = (
        "import sys; from pathlib import Path; from actorlearner.runtime.lifecycle import *\n"
        "def run(stop): raise RoleError('no such thing', ExitCode(int(sys.argv[1])))\n"
        "run_to_exit(run if int(sys.argv[1]) else lambda stop: ExitCode.DONE, Path(sys.argv[2]))"
    )
    for file, expected in ((path, exit_code), (tmp_path / "missing" / "code", int(code))):
        ended = subprocess.run(
            [sys.executable, "-c", script, str(int(code)), str(file)],
            env={**os.environ, "PYTHONPATH": str(SOURCE_ROOT)},
            stderr=subprocess.PIPE,
            text=True,
            timeout=50,
        )
        assert ended.returncode == expected, ended.stderr
        assert ("error: no such thing" in ended.stderr) == (code != ExitCode.DONE)
    assert (path.read_text() if path.exists() else None) == written


_ENDINGS = {
    "return ExitCode.DONE": (0, ""),
    "raise RoleError('no such thing', ExitCode.USAGE)": (64, "error: no such thing\n"),
    "os.kill(os.getpid(), signal.SIGTERM); stop.wait(60); raise Stopped('x')": (143, ""),
    "os.kill(os.getpid(), signal.SIGINT); stop.wait(60); return stop.exit_code": (130, ""),
    "os.kill(os.getpid(), 2); time.sleep(0.6); os.kill(os.getpid(), 2); time.sleep(60)": (130, ""),
    # As when a scheduler signals the whole job and its script passes the signal on: time to save is left.
    "os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGINT); return ExitCode.DONE": (0, ""),
    # The same while the main thread is inside one long call, as when it saves.
    "lifecycle.SECOND_SIGNAL_SECS = 2; threading.Timer(0.1, os.kill, (os.getpid(), 15)).start();"
    " os.kill(os.getpid(), 15); hashlib.pbkdf2_hmac('sha256', b'', b'', 6_000_000); return ExitCode.DONE": (0, ""),
    "raise ZeroDivisionError": (1, "ZeroDivisionError"),
    "open('/dev/full', 'w', buffering=1).write('x\\n')": (73, "error: the disk is full: [Errno 28] No space left on"),
    # A directory that was made read-only; root may write to it all the same.
    "folder = tempfile.mkdtemp(); os.chmod(folder, 0o555); os.geteuid() or os.setuid(65534);"
    " open(folder + '/metrics.jsonl', 'a')": (73, "error: a file or folder may not be used: [Errno 13] Permission"),
    "raise OSError(errno.EROFS, os.strerror(errno.EROFS), '/run/x')": (73, "Read-only file system: '/run/x'. Let this"),
    # As TensorFlow says it.
    "raise RuntimeError('/run/ckpt-2_temp/part-0; Read-only file system')": (73, "error: a file or folder may not be"),
    # Of no file: that of a port, say.
    "raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))": (1, "PermissionError"),
    "threading.Thread(target=time.sleep, args=(60,)).start(); return ExitCode.DONE": (0, ""),
}


@pytest.mark.parametrize("body", _ENDINGS)
def test_a_process_ends_with_a_code_that_says_why(body):
    """A launcher restarts what may get better and leaves what cannot; blocked threads must not keep a process."""
    code = f"""
import errno, hashlib, os, signal, tempfile, threading, time
from actorlearner.runtime import lifecycle
from actorlearner.runtime.lifecycle import *
from actorlearner.runtime.lifecycle import RoleError, Stopped, ExitCode
def run(stop):
    {body}
run_to_exit(run)
"""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE_ROOT)}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True, timeout=50)
    exit_code, message = _ENDINGS[body]
    assert ended.returncode == exit_code
    assert message in ended.stderr
    assert ("Traceback" in ended.stderr) == (exit_code == 1)
