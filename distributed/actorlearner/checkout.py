"""The checkout that this package runs from, if any: it has benchmarks and drills, which are not installed."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from actorlearner.runtime.lifecycle import ExitCode

ROOT = Path(__file__).resolve().parents[2]
"""In an installed package this folder has neither."""


def load(name: str) -> ModuleType:
    """Returns a module of the checkout, such as `drills.run`.

    Raises:
      SystemExit: This is an installed package; exit code 64, after printing the message to stderr.
    """
    folder, _, module = name.partition(".")
    script = {"benchmarks": "bench", "drills": "drill"}[folder]
    if not (ROOT / folder / f"{module}.py").is_file():
        print(
            f"error: the {folder} are not in the installed package. Run them from a checkout of the repository: "
            f"./launch/{script}.sh",
            file=sys.stderr,
        )
        raise SystemExit(ExitCode.USAGE)
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    return importlib.import_module(name)
