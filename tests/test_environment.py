"""launch/environment.sh, which makes .venv for launch/local.sh, launch/bench.sh and tests/run.sh."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
BUILD_TOOLS = ("packaging", "setuptools", "wheel")  # what set-up installs first, from the lock file


def make_wheel_of_installed(name: str, target: Path) -> str:
    """Packs an installed pure-Python distribution into a wheel again and returns its `name==version`."""
    distribution = metadata.distribution(name)
    files = [file for file in distribution.files or [] if ".." not in file.parts and file.suffix != ".pyc"]
    with zipfile.ZipFile(target / f"{name}-{distribution.version}-py3-none-any.whl", "w") as packed:
        for file in files:
            packed.write(str(file.locate()), str(file))
    return f"{name}=={distribution.version}"


def make_checkout(base: Path) -> Path:
    """Makes a checkout whose set-up is real but small: its lock files name the build tools alone, and no network."""
    checkout = base / "check out"  # with a space: people have such directories
    (base / "wheels").mkdir()
    package = checkout / "distributed" / "actorlearner"
    package.mkdir(parents=True)
    shutil.copytree(CHECKOUT / "launch", checkout / "launch")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(CHECKOUT / name, checkout)
    for name in ("__init__.py", "supported_platform.py"):
        shutil.copy(CHECKOUT / "distributed" / "actorlearner" / name, package)
    (package / "cli.py").write_text("import sys\n\n\ndef main():\n    print(sys.argv[1:])\n")
    lock = [make_wheel_of_installed(tool, base / "wheels") for tool in BUILD_TOOLS]
    for name in ("requirements.lock", "requirements-test.lock"):
        (checkout / name).write_text("".join(f"{line} ; python_version > '3'\n" for line in lock))
    (checkout / "requirements-bench.lock").write_text("torch==0.0.0+nowhere\n")
    return checkout


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """A checkout that has been set up."""
    checkout = make_checkout(tmp_path_factory.mktemp("set_up"))
    first = start(checkout)
    assert first.returncode == 0, first.stderr
    return checkout


@pytest.fixture
def checkout(pristine):
    """`pristine`, put back afterwards into the state that the test found; for tests that install nothing."""
    kept = {path: path.read_bytes() for path in (pristine / "requirements.lock", pristine / ".venv" / "setup-stamp")}
    yield pristine
    for path, content in kept.items():
        path.write_bytes(content)


def environment(checkout: Path) -> "dict[str, str]":
    """The environment to start the scripts in: no network, no uv, this Python."""
    dropped = ("PIP_", "UV_", "PYTHON", "PEERS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    places = [place for place in kept["PATH"].split(":") if not os.path.exists(os.path.join(place, "uv"))]
    return {
        **kept,
        "PATH": ":".join(places),
        "PYTHON": sys.executable,
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": (checkout.parent / "wheels").as_uri(),
    }


def start(
    checkout: Path, *arguments: str, script: str = "local.sh", **overrides: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(checkout / "launch" / script), *arguments],
        cwd=checkout.parent,  # anywhere but the checkout
        env={**environment(checkout), **overrides},
        capture_output=True,
        text=True,
    )


def state(checkout: Path) -> "dict[str, int]":
    paths = (path for path in (checkout / ".venv").rglob("*") if "__pycache__" not in path.parts)
    return {str(path): path.lstat().st_mtime_ns for path in paths}


def test_second_start_is_quick_and_leaves_the_environment_alone(checkout):
    before = state(checkout)
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy
        began = time.monotonic()
        second = start(checkout)
        seconds.append(time.monotonic() - began)
    assert second.stdout == "['train', 'sac_minitaur']\n"
    assert second.stderr == ""
    assert state(checkout) == before
    assert min(seconds) < 2


@pytest.mark.parametrize(
    ("given", "passed_on"),
    [
        ([], ["sac_minitaur"]),
        (["--num_collect_actors=4"], ["sac_minitaur", "--num_collect_actors=4"]),
        (["dqn_cartpole"], ["dqn_cartpole"]),
        (["my own.gin", "--gin_bindings=a.b = 'c d'"], ["my own.gin", "--gin_bindings=a.b = 'c d'"]),
    ],
)
def test_local_passes_its_arguments_on_and_names_the_default_experiment(checkout, given, passed_on):
    assert start(checkout, *given).stdout == f"{['train', *passed_on]}\n"


def test_help_needs_no_environment(tmp_path):
    shutil.copytree(CHECKOUT / "launch", tmp_path / "launch")
    told = start(tmp_path, "--help")
    assert told.returncode == 0
    assert "Usage: launch/local.sh [EXPERIMENT]" in told.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["launch"]


def staleness(checkout: Path, level: str = "run", **overrides: str) -> str:
    script = 'set -eu; . "$1/launch/environment.sh"; find_staleness "$2"; echo "$stale"'
    command = ["bash", "-c", script, "-", str(checkout), level]
    settings = {**environment(checkout), **overrides}
    return subprocess.run(command, env=settings, check=True, capture_output=True, text=True).stdout.strip()


def test_stale_environment_is_noticed(checkout):
    """A set-up that was interrupted, or new versions after `git pull`, must not end in an import error in training."""
    stamp = checkout / ".venv" / "setup-stamp"
    where, python, lock, _ = stamp.read_text().splitlines()
    assert staleness(checkout) == ""
    assert staleness(checkout, "test") == "no test tools"
    for line in ("incomplete\n", ""):
        stamp.write_text(line)
        assert staleness(checkout) == "an earlier set-up was interrupted"
    stamp.write_text(f"/elsewhere\n{python}\n{lock}\nno test tools\n")
    assert staleness(checkout) == "the checkout has moved"
    stamp.write_text(f"{where}\n2.7\n{lock}\nno test tools\n")
    assert staleness(checkout) == "its Python 2.7 is gone or has changed"
    stamp.write_text(f"{where}\n{python}\n{lock}\nno test tools\n")
    assert staleness(checkout) == ""
    with (checkout / "requirements.lock").open("a") as requirements:
        requirements.write("# a new version\n")
    assert staleness(checkout) == "requirements.lock or setup.py has changed"


def test_environment_in_use_is_not_replaced(checkout):
    """A `git pull` and a second start would otherwise delete the libraries under a training that runs."""
    (checkout / ".venv" / "setup-stamp").write_text("incomplete\n")
    before = state(checkout)
    with (checkout / ".setup" / "in-use").open() as in_use:
        fcntl.flock(in_use, fcntl.LOCK_SH)  # as a running training holds it
        refused = start(checkout)
    assert refused.returncode == 1
    assert "something runs out of it" in refused.stderr
    assert state(checkout) == before


def test_interrupted_set_up_is_made_anew_once_by_concurrent_starts(tmp_path):
    """Two terminals, or a job array on one checkout, would otherwise install over each other."""
    checkout = make_checkout(tmp_path)
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "setup-stamp").write_text("incomplete\n")
    (checkout / ".venv" / "left-over").touch()
    command = [str(checkout / "launch" / "local.sh")]
    starts = [
        subprocess.Popen(command, env=environment(checkout), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate() for process in starts]
    assert [out for out, _ in said] == ["['train', 'sac_minitaur']\n"] * 3
    assert sum(f"making {checkout}/.venv, as an earlier set-up was interrupted" in err for _, err in said) == 1
    assert sum("waiting for another start" in err for _, err in said) == 2
    assert not (checkout / ".venv" / "left-over").exists()


def test_environment_of_someone_else_is_not_touched(tmp_path):
    """People make a .venv of their own in a checkout, and what they installed there is theirs."""
    shutil.copytree(CHECKOUT / "launch", tmp_path / "launch")
    (tmp_path / ".venv").mkdir()
    refused = start(tmp_path)
    assert refused.returncode == 1
    assert "was not made by this script" in refused.stderr
    assert not list((tmp_path / ".venv").iterdir())


def test_set_up_that_cannot_install_tries_uv_then_pip_and_says_what_to_do(tmp_path):
    """uv knows neither pip's mirrors nor, always, the machine's certificates; and a half-made .venv is not one."""
    checkout = make_checkout(tmp_path)
    with (checkout / "requirements.lock").open("a") as lock:
        lock.write("no-such-package-anywhere==1.0\n")
    (tmp_path / "uv").write_text("#!/bin/sh\necho 'no route to the index' >&2\nexit 2\n")
    (tmp_path / "uv").chmod(0o755)
    failed = start(checkout, PATH=f"{tmp_path}:{environment(checkout)['PATH']}")
    assert failed.returncode == 1
    assert failed.stdout == ""
    told = [
        "no route to the index",
        "setup: uv failed, for the reason above; trying pip",
        "no-such-package-anywhere",
        "setup: error: could not install what requirements.lock names",
    ]
    places = [failed.stderr.find(line) for line in told]
    assert -1 not in places and places == sorted(places), failed.stderr
    assert staleness(checkout) == "an earlier set-up was interrupted"


def bench(checkout: Path, *asked: str) -> "subprocess.CompletedProcess[str]":
    """Runs launch/bench.sh, which must get as far as the benchmarks."""
    began = start(checkout, *asked, script="bench.sh")
    assert (began.returncode, began.stdout) == (0, f"{['bench', *asked]}\n"), began.stderr
    return began


def test_benchmarks_go_on_without_peers_that_cannot_be_installed(checkout):
    """Their torch comes from an index of its own, which not every machine reaches; most comparisons need none of it."""
    peers = checkout / ".venv-bench"
    peers.mkdir(exist_ok=True)
    (peers / "setup-stamp").write_text("of an older lock file\n")
    (peers / "left-over").touch()
    told = bench(checkout, "--only", "minitaur", "learner").stderr
    assert "setup: error: could not install" in told  # what the lock names, or a Python for it
    assert "setup: going on without them" in told
    assert (peers / "setup-stamp").read_text() == "incomplete\n", "older versions would be measured for these"
    assert not (peers / "left-over").exists()


@pytest.mark.parametrize(
    "asked", [["--only", "learner-gpu"], ["--only=endurance", "--minutes=60"], ["--markdown=bench.json"]]
)
def test_benchmarks_without_peers_fetch_none(checkout, asked):
    """They are a gigabyte that printing a table or an endurance run does not need."""
    assert bench(checkout, *asked).stderr == ""


def test_ctrl_c_while_peers_are_installed_starts_no_benchmark(checkout):
    """At Ctrl-C pip and uv exit as if they had failed, and half an hour of measuring would start."""
    uv = checkout.parent / "slow" / "uv"
    uv.parent.mkdir()
    uv.write_text("#!/bin/bash\ntrap 'exit 1' INT\necho at work >&2\nfor _ in {1..300}; do sleep 0.1; done\n")
    uv.chmod(0o755)
    settings = environment(checkout)
    began = subprocess.Popen(
        [str(checkout / "launch" / "bench.sh")],
        env={**settings, "PATH": f"{uv.parent}:{settings['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whoever runs the tests may be ignoring it
    )
    try:
        assert "at work\n" in iter(began.stderr.readline, "")
        os.killpg(began.pid, signal.SIGINT)
        stdout, _ = began.communicate(timeout=10)
        assert (began.returncode, stdout) == (130, "")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(began.pid, signal.SIGKILL)
