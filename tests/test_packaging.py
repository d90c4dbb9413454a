"""The package, its lock files and what sets up: launch/local.sh, launch/bench.sh, tests/run.sh and what they share."""

import ast
import contextlib
import fcntl
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from actorlearner import supported_platform

CHECKOUT = Path(__file__).resolve().parent.parent
BUILD_TOOLS = ("packaging", "setuptools", "wheel")  # what set-up installs first, from the lock file


# --- the package -----------------------------------------------------------------------------------------------------


def build(what: str, source: Path, target: Path) -> Path:
    """Returns the `what` ("sdist" or "wheel") that the build backend makes of `source`, as pip would."""
    target.mkdir()
    subprocess.run(
        [sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_{what}({str(target)!r})"],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the checkout's sources, with one experiment more."""
    source = tmp_path_factory.mktemp("source") / "actorlearner"
    skip = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(CHECKOUT, source, ignore=skip)
    (source / "gin" / "agents" / "new").mkdir(parents=True)
    (source / "gin" / "agents" / "new" / "algorithm.gin").write_text("# an experiment somebody added\n")
    return source


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> zipfile.ZipFile:
    """The wheel made from the source distribution, so that both are looked at."""
    target = tmp_path_factory.mktemp("built")
    with tarfile.open(build("sdist", source, target / "sdist")) as sdist:
        sdist.extractall(target)
    (unpacked,) = target.glob("actorlearner-*")
    return zipfile.ZipFile(build("wheel", unpacked, target / "wheel"))


def test_wheel_holds_every_experiment(source, wheel):
    """An installed package without its gin files can train nothing."""
    ours = {"actorlearner/experiments/" + str(path.relative_to(source / "gin")) for path in source.glob("gin/**/*.gin")}
    shipped = {name for name in wheel.namelist() if name.endswith(".gin")}
    assert "actorlearner/experiments/agents/new/algorithm.gin" in ours
    assert shipped == ours


def test_wheel_holds_every_module_and_nothing_beside_the_package(source, wheel):
    """A directory without __init__.py is left out of the wheel without a word."""
    ours = {str(path.relative_to(source / "distributed")) for path in source.glob("distributed/**/*.py")}
    assert {name for name in wheel.namelist() if name.endswith(".py")} == ours
    assert {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name} == {"actorlearner"}


def test_wheel_has_the_version_of_the_package_and_its_command(wheel):
    version = re.search(r'__version__ = "(.+)"', (CHECKOUT / "distributed/actorlearner/__init__.py").read_text())
    assert version
    info = f"actorlearner-{version.group(1)}.dist-info"
    assert f"Version: {version.group(1)}\n" in wheel.read(f"{info}/METADATA").decode()
    assert "actorlearner = actorlearner.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_experiments_are_not_a_python_package():
    """`gin/__init__.py` in a checkout would be imported in place of gin-config."""
    assert not list(CHECKOUT.glob("gin/**/__init__.py"))


# --- the lock files --------------------------------------------------------------------------------------------------


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lock: str) -> "dict[str, list[str]]":
    """Returns the lines of a lock file by the name of what they pin; fails on a line that pins nothing."""
    found: dict[str, list[str]] = {}
    for line in (CHECKOUT / lock).read_text().splitlines():
        if line and not line.lstrip().startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==[^ ;*]+( ; .+)?", line)
            assert match, f"{lock} pins nothing with: {line}"
            found.setdefault(normalized(match.group(1)), []).append(line)
    return found


def requirements(monkeypatch) -> "tuple[list[str], list[str]]":
    """Returns what setup.py asks for: to run, and for the tests."""
    asked: dict[str, object] = {}
    monkeypatch.setattr("setuptools.setup", lambda **given: asked.update(given))
    runpy.run_path(str(CHECKOUT / "setup.py"))
    return asked["install_requires"], asked["extras_require"]["test"]  # type: ignore[index, return-value]


def test_lock_files_pin_everything_that_setup_asks_for(monkeypatch):
    """Someone who adds a requirement and forgets `make lock` would find out on the next machine."""
    run, test = requirements(monkeypatch)
    for lock, asked in (("requirements.lock", run), ("requirements-test.lock", run + test)):
        pinned = pins(lock)
        for requirement in asked:
            name = normalized(re.split(r"[<>=!~\[ ;]", requirement)[0])
            assert name in pinned, f"{lock} lacks {name}: run `make lock`"
            if "==" in requirement:
                assert pinned[name] == [requirement], f"{lock} pins another {name}: run `make lock`"


def test_lock_of_the_benchmarks_peers_pins_what_they_are():
    """They are in no extra: nothing that has TensorFlow 2.15 can have them beside it."""
    pinned = pins("requirements-bench.lock")
    asked = (CHECKOUT / "benchmarks" / "requirements.in").read_text().splitlines()
    names = {normalized(re.split(r"[=\s]", line)[0]) for line in asked if not line.startswith("#")}
    assert {"jax", "sbx-rl", "stable-baselines3", "torch"} == names <= set(pinned)


def test_tests_run_with_the_versions_that_training_runs_with():
    run, test = (
        {name: {line.split(" ;")[0] for line in lines} for name, lines in pins(lock).items()}  # a tool may need one on
        for lock in ("requirements.lock", "requirements-test.lock")  # more Pythons than training does
    )
    assert {name: test.get(name) for name in run} == run


def test_lock_files_say_how_they_are_made_and_name_no_place():
    """An index address or a path of the machine that made them would bind everybody to it."""
    for lock in ("requirements.lock", "requirements-test.lock", "requirements-bench.lock"):
        text = (CHECKOUT / lock).read_text()
        assert "make lock" in text.splitlines()[1]
        assert not re.search(r"https?://|--index|--find-links|(^|\s)/\w+", text)


# --- unsupported platforms -------------------------------------------------------------------------------------------

GOOD = {"implementation": "CPython", "version": (3, 10, 4), "system": "Linux", "machine": "x86_64", "libc": "glibc"}


@pytest.mark.parametrize("minor", [9, 10, 11])
def test_supported_platforms_pass(minor):
    assert supported_platform.describe_problem(**{**GOOD, "version": (3, minor, 0)}) == ""  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "found"),
    [
        ({"version": (3, 12, 1)}, "CPython 3.12.1 on Linux x86_64"),
        ({"version": (3, 8, 18)}, "CPython 3.8.18 on Linux x86_64"),
        ({"implementation": "PyPy"}, "PyPy 3.10.4 on Linux x86_64"),
        ({"system": "Darwin", "machine": "arm64", "libc": ""}, "CPython 3.10.4 on Darwin arm64"),
        ({"system": "Windows", "machine": "AMD64", "libc": ""}, "CPython 3.10.4 on Windows AMD64"),
        ({"machine": "aarch64"}, "CPython 3.10.4 on Linux aarch64"),
        ({"libc": ""}, "CPython 3.10.4 on Linux x86_64 without glibc"),
        ({"is_64_bit": False}, "CPython 3.10.4 (32-bit) on Linux x86_64"),
    ],
)
def test_unsupported_platform_is_told_what_was_found_what_is_supported_and_what_to_do(facts, found):
    problem = supported_platform.describe_problem(**{**GOOD, **facts})
    assert f"found:     {found}\n" in problem
    assert "CPython 3.9-3.11 (64-bit) on Linux x86_64" in problem
    assert "docker/" in problem


# Makes the interpreter say that it is a Python 3.12, then does what is given.
PRETEND = "import runpy, sys; sys.version_info = (3, 12, 1, 'final', 0); sys.argv = sys.argv[1:]; "


@pytest.mark.parametrize(
    "start",
    [
        "runpy.run_path('setup.py', run_name='__main__')",
        "sys.path.insert(0, 'distributed'); runpy.run_module('actorlearner', run_name='__main__')",
        "runpy.run_path('distributed/actorlearner/supported_platform.py', run_name='__main__')",
    ],
    ids=["setup.py", "python -m actorlearner", "supported_platform.py"],
)
def test_unsupported_python_gets_one_message_and_exit_code_64(start):
    """What came before was a traceback from an import, or from pip's search for a dm-reverb that does not exist."""
    ran = subprocess.run(
        [sys.executable, "-c", PRETEND + start, "setup.py", "--version"], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert ran.returncode == 64
    assert ran.stderr.startswith("actorlearner does not run here.\n  found:     CPython 3.12.1 on Linux x86_64\n")
    assert len(ran.stderr.splitlines()) == 4
    assert ran.stdout == ""


def test_what_unsupported_pythons_run_has_the_syntax_of_python_3_6():
    """A message that does not parse is a traceback."""
    for name in ("__init__.py", "__main__.py", "supported_platform.py"):
        ast.parse((CHECKOUT / "distributed" / "actorlearner" / name).read_text(), feature_version=(3, 6))
    ast.parse((CHECKOUT / "setup.py").read_text(), feature_version=(3, 6))


# --- the set-up scripts ----------------------------------------------------------------------------------------------


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
    """They are a gigabyte, and whoever reads a table again or measures an endurance waits for it in vain."""
    assert bench(checkout, *asked).stderr == ""


def test_ctrl_c_while_peers_are_installed_starts_no_benchmark(checkout):
    """pip and uv end at it as if they had failed, and half an hour of measuring would begin."""
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
