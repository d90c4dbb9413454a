"""THE DOOR: one command, `actorlearner`, with a subcommand for each role and each tool.

A tool is a module in the folder tools/ with `add_arguments(parser)` and `run(arguments) -> int`; it is found by its
file name, and the first line of its docstring is its help. Only the chosen subcommand's module is imported.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Protocol

from actorlearner import __version__, tools
from actorlearner.launcher import train
from actorlearner.roles import process
from actorlearner.supported_platform import check_platform


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs one subcommand and returns its exit status; roles end the process themselves."""
    check_platform()
    arguments = make_parser().parse_args(argv)
    return arguments.run(arguments)


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="actorlearner", description="Reinforcement learning as separate processes, with TF-Agents and Reverb."
    )
    parser.add_argument("--version", action="version", version=f"actorlearner {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Subparser)
    for name, command in find_commands().items():
        text = command.summary
        chosen = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        chosen.set_defaults(command=name)
        chosen.source = command
    return parser


class Command(Protocol):
    """A subcommand.

    Attributes:
      summary: One line for --help, without a full stop.
    """

    @property
    def summary(self) -> str: ...

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None: ...

    def run(self, arguments: argparse.Namespace, /) -> int: ...


def find_commands() -> Mapping[str, Command]:
    """Returns all subcommands by name: `train`, the roles, then the tools in alphabetical order."""
    return {"train": _Module("train", train.__name__, Path(train.__file__)), **process.COMMANDS, **dict(_find_tools())}


def _find_tools() -> Iterator[tuple[str, Command]]:
    for found in pkgutil.iter_modules(tools.__path__):
        spec = found.module_finder.find_spec(found.name, None)
        if not found.ispkg and spec and spec.origin:  # folders hold the tools' own modules
            name = found.name.replace("_", "-")
            yield name, _Module(name, f"{tools.__name__}.{found.name}", Path(spec.origin))


class _Module:
    """The subcommand of a module, which is imported only if it is chosen."""

    def __init__(self, name: str, module: str, path: Path):
        self._name, self._module, self._path = name, module, path

    @property
    def summary(self) -> str:
        with open(self._path, encoding="utf-8") as lines:
            first = lines.readline().strip().strip('"').rstrip(".") or self._name
        return first[0].lower() + first[1:]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        importlib.import_module(self._module).add_arguments(parser)

    def run(self, arguments: argparse.Namespace) -> int:
        return importlib.import_module(self._module).run(arguments)


class _Subparser(argparse.ArgumentParser):
    """A parser that adds its command's arguments only if the command is chosen.

    Arguments after `--` are not parsed: they go to `behind_dashes` if the command has that default.
    """

    source: Optional[Command] = None  # None once its arguments are added

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        if self.source is not None:
            self.source.add_arguments(self)
            self.set_defaults(run=self.source.run)
            self.source = None
        if self.get_default("behind_dashes") is None:
            return super().parse_known_args(words, namespace)
        cut = words.index("--") if "--" in words else len(words)
        parsed, rest = super().parse_known_args(words[:cut], namespace)
        parsed.behind_dashes = words[cut + 1 :]
        return parsed, rest
