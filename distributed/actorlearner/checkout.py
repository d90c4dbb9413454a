"""The checkout that this package runs from, if any: it has benchmarks and drills, which are not installed."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from actorlearner.runtime.lifecycle import ExitCode

ROOT = Path(__file__).resolve().parents[2]
"""In an installed package this folder has neither."""


def has(name: str) -> bool:
    """Returns whether there is a checkout with this module, such as `drills.run`."""
    folder, _, module = name.partition(".")
    return (ROOT / folder / f"{module}.py").is_file()


def load(name: str) -> ModuleType:
    """Returns a module of the checkout, such as `drills.run`.

    Raises:
      SystemExit: This is an installed package; exit code 64, after printing the message to stderr.
    """
    folder = name.partition(".")[0]
    script = {"benchmarks": "bench", "drills": "drill"}[folder]
    if not has(name):
        print(
            f"error: the {folder} are not in the installed package. Run them from a checkout of the repository: "
            f"./launch/{script}.sh",
            file=sys.stderr,
        )
        raise SystemExit(ExitCode.USAGE)
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))  # before any other package of these names
    return importlib.import_module(name)
