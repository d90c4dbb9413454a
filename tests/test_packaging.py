"""The package: what it is made of, its lock files, and the platforms that it supports."""

import ast
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
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
    """A directory without __init__.py is silently left out of the wheel."""
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
