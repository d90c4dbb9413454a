"""Which module may import which: the arrows of the design, checked against the code's imports."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import actorlearner

PACKAGE = Path(actorlearner.__file__).parent

# For each layer, the layers whose modules it may import, with all below them; "*" may import anything.
MAY_IMPORT = {
    "cli": {"*"},
    "launcher.train": {"cluster", "flags", "launcher", "run", "runtime"},
    "launcher": {"launcher", "run", "runtime"},
    "__main__": {"cli", "supported_platform"},
    "__init__": set(),
    "supported_platform": set(),
    "checkout": {"runtime"},
    "flags": {"experiment", "run", "runtime"},
    "runtime": {"runtime"},
    "cluster": set(),
    "variable_container": {"runtime"},
    "replay.checkpoint_service": {"replay", "runtime", "variable_container"},
    "replay.pace": {"replay", "runtime", "variable_container"},
    "replay": {"replay", "runtime"},
    "agents.base": {"runtime"},
    "agents.acting": set(),
    "agents.policies": {"agents.acting"},
    "agents.exported": set(),
    # What several algorithms need.
    "agents.networks": {"agents.normalized"},
    "agents.normalized": {"agents.base"},
    "agents.n_step": set(),
    "agents.optimizers": set(),
    "agents": {"agents.base", "agents.networks", "agents.normalized", "agents.n_step", "agents.optimizers"},
    "environments.base": {"environments.checks"},
    "environments.batch": {"environments.actions", "environments.base", "environments.checks", "runtime"},
    "environments.actions": {"environments.checks"},
    "environments.checks": set(),
    "environments": {"environments"},
    "experiment": {
        "agents.base",
        "agents.policies",
        "environments.actions",
        "environments.base",
        "environments.batch",
        "replay",
        "variable_container",
        "runtime",
    },
    # What the roles share: the run's files and the messages between actors and learner.
    "reports": {"runtime"},
    "evaluations": {"evaluations", "variable_container", "runtime"},
    "run.directory": {"run.status", "runtime"},
    "run.status": set(),
    "run.starts": {"run.directory"},
    "run.record": {"cluster", "evaluations", "experiment", "reports", "run", "runtime", "variable_container"},
    "run.policies": {"agents.exported", "agents.policies", "runtime"},
    "run.missing_policies": {"evaluations", "run", "runtime", "variable_container"},
    "run": {"runtime"},
    # The collect actor's inside.
    "collecting": {
        "agents.acting",
        "agents.policies",
        "cluster",
        "collecting",
        "environments.checks",
        "experiment",
        "replay",
        "reports",
        "runtime",
        "variable_container",
    },
    # The learner's inside.
    "training": {
        "agents.policies",
        "cluster",
        "evaluations",
        "experiment",
        "replay",
        "run",
        "runtime",
        "training",
        "variable_container",
    },
    "roles": {
        "cluster",
        "collecting",
        "environments.batch",
        "environments.checks",
        "evaluations",
        "experiment",
        "replay",
        "reports",
        "run",
        "runtime",
        "training",
        "variable_container",
    },
    "roles.process": {"checkout", "cluster", "flags", "roles", "reports", "experiment", "run", "runtime", "tools"},
    "tools.keep_running": {"launcher.command", "launcher.restarts", "runtime"},
    "tools.sweep": {"launcher.train", "run", "runtime", "tools.sweeping"},
    "tools.sweeping": {"experiment", "launcher.command", "run", "runtime", "tools.sweeping"},
    "tools": {"checkout", "cluster", "experiment", "flags", "replay", "run", "runtime", "tools", "variable_container"},
}

# Folders of nodes, which must not import one another.
NODES = ("roles",)

# Folders of things that gin files choose from: what a file binds there is named in gin files only.
PLUGGABLE = ("agents", "environments", "replay")

REVERB_CLIENTS = ("Client", "TimestepDataset", "TrajectoryDataset")

HEAVY = {"tensorflow", "reverb", "tf_agents", "gin", "numpy", "gym", "pybullet", "matplotlib"}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name[: -len(".__init__")] if name.endswith(".__init__") else name


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer_of(module: str) -> str:
    """Returns the key of MAY_IMPORT that `module`, a name below the package, belongs to: the longest that fits."""
    fitting = [layer for layer in MAY_IMPORT if module == layer or module.startswith(layer + ".")]
    assert fitting, f"{module} belongs to no layer: give it one in this test and in the design"
    return max(fitting, key=len)


def is_within(module: str, layers: set[str]) -> bool:
    """Returns whether a module is in one of these layers."""
    return "*" in layers or any(module == name or module.startswith(name + ".") for name in layers)


def imports_of(module: str) -> set[str]:
    """Returns what `module` imports of the package, also inside functions; names below the package."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative imports hide what is imported"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            head, _, below = name.partition(".")
            while head == "actorlearner" and below:
                if below in MODULES:
                    found.add(below)
                    break
                below = below.rpartition(".")[0]
    return found


def test_the_imports_are_read():
    """A test that reads nothing finds nothing."""
    assert {"runtime.messages", "runtime.lifecycle", "variable_container"} <= imports_of("roles.eval_actor")
    assert "roles.learner" in imports_of("roles.process")  # inside a function


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_layer_may(module):
    """Arrows that point both ways are how a system of parts becomes one lump."""
    allowed = MAY_IMPORT[layer_of(module)]
    forbidden = {name for name in imports_of(module) if not is_within(name, allowed)}
    assert not forbidden, f"{module} (layer '{layer_of(module)}') must not import {', '.join(sorted(forbidden))}"


@pytest.mark.parametrize("module", MODULES)
def test_reverbs_clients_are_led_to_where_reach_says(module):
    """One that takes the address itself goes round the TLS tunnel, and finds the port closed."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of_reverb = ast.unparse(node.func.value) == "reverb" and node.func.attr in REVERB_CLIENTS
            if of_reverb or node.func.attr == "from_table_signature":
                given = ast.unparse(node.args[0])
                assert given.startswith("reach("), f"{module} line {node.lineno}: expected reach({given})"


def chosen_in_gin(folder: str) -> set[str]:
    """Returns the modules of a folder that bind a name for gin files: an algorithm, a suite, a replay or a role."""
    return {
        name for name in MODULES if name.startswith(folder + ".") and "@gin.configurable(" in MODULES[name].read_text()
    }


@pytest.mark.parametrize("folder", NODES)
def test_nodes_do_not_know_each_other(folder):
    """Nodes meet only at edges: a role that imports another cannot be started without it."""
    nodes = chosen_in_gin(folder)
    assert len(nodes) >= 4, "they are found by listing the folder"
    for module in nodes:
        neighbours = imports_of(module) & nodes
        assert not neighbours, f"{module} must not import {', '.join(sorted(neighbours))}"


@pytest.mark.parametrize("folder", PLUGGABLE)
def test_what_gin_files_choose_is_named_in_gin_files_only(folder):
    """A new algorithm, suite or replay must be one Python file and one gin file, and no existing line.

    A suite may build on another one.
    """
    chosen = chosen_in_gin(folder)
    assert len(chosen) >= 2, "they are found by listing the folder"
    for module in MODULES:
        named = imports_of(module) & chosen
        if folder == "environments" and module.startswith("environments."):
            continue
        assert not named, f"{module} must not name {', '.join(sorted(named))}"


def test_every_algorithm_and_suite_has_a_gin_file_that_imports_it():
    """What no gin file imports cannot be bound: gin has never heard of it."""
    files = [path.read_text() for path in (PACKAGE.parent.parent / "gin").rglob("*.gin")]
    for module in set().union(*map(chosen_in_gin, PLUGGABLE)):
        assert any(f"import actorlearner.{module}\n" in text for text in files), module


def heavy_modules_after(code: str) -> set[str]:
    report = f"import sys\n{code}\nprint('imported', *sorted(set(sys.modules) & {HEAVY!r}))"
    ended = subprocess.run(
        [sys.executable, "-c", report],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    last = ended.stdout.splitlines()[-1].split() if ended.stdout else []
    assert ended.returncode == 0 and last[0] == "imported", ended.stderr
    return set(last[1:])


def test_train_imports_nothing_heavy():
    """The launcher is on the screen within a second, and costs no memory beside the roles."""
    code = "from actorlearner import cli; import actorlearner.launcher.local; cli.make_parser()"
    assert heavy_modules_after(code) == set()


@pytest.mark.parametrize("module", ["cluster", "run.directory", "runtime.lifecycle", "runtime.telemetry"])
def test_what_the_door_needs_before_a_role_starts_is_light(module):
    """A wrong flag must be answered before TensorFlow is imported."""
    assert heavy_modules_after(f"import actorlearner.{module}") == set()


def test_a_tool_is_light_until_it_runs():
    """`actorlearner TOOL --help`, and a wrong flag, must be answered before TensorFlow is imported."""
    tools = [name for name, path in MODULES.items() if path.parent == PACKAGE / "tools" and path.stem != "__init__"]
    assert "tools.video" in tools
    code = "\n".join(f"import actorlearner.{tool} as tool; tool.add_arguments, tool.run" for tool in tools)
    assert heavy_modules_after(code) == set()
