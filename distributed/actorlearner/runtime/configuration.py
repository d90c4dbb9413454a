"""Reads gin files strictly: an error names the line of any unknown name, wrong type or value out of range.

gin itself accepts a misspelt macro, any type and any value; a role would fail minutes later, or never. Types and ranges
are those in the configurables' annotations, e.g. `Annotated[int, annotated_types.Ge(1)]`.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import importlib
import inspect
import logging
import operator
import os
import re
import tokenize
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional, Union

import annotated_types
import gin
from gin import config_parser

from actorlearner.runtime.lifecycle import ExitCode, RoleError

COMMAND_LINE = "--gin_bindings"
_UNDIVIDED = re.compile(r"""(?:'[^'\n]*'|"[^"\n]*"|[^;\n])+""")

PositiveInt = Annotated[int, annotated_types.Ge(1)]
NonNegativeInt = Annotated[int, annotated_types.Ge(0)]
PositiveFloat = Annotated[float, annotated_types.Gt(0)]
NonNegativeFloat = Annotated[float, annotated_types.Ge(0)]
Fraction = Annotated[float, annotated_types.Interval(ge=0, le=1)]


@dataclasses.dataclass(frozen=True)
class Binding:
    """One line `scope/selector.parameter = value`; a macro (`name = value`) has no parameter."""

    scope: str
    selector: str
    parameter: str
    value: Any
    place: str  # "file:line" or "--gin_bindings"

    @property
    def name(self) -> str:
        key = f"{self.selector}.{self.parameter}" if self.parameter else self.selector
        return f"{self.scope}/{key}" if self.scope else key


@dataclasses.dataclass(frozen=True)
class _Macro:
    name: str


@dataclasses.dataclass(frozen=True)
class _Reference:
    name: str
    evaluate: bool


class _KeepNames(config_parser.ParserDelegate):
    """Parses `%macro` and `@configurable` without looking them up."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> _Reference:
        return _Reference(scoped_configurable_name, evaluate)

    def macro(self, macro_name: str) -> _Macro:
        return _Macro(macro_name)


def parse_strictly(config_file: Path, bindings: Sequence[str], search_path: Sequence[Path]) -> None:
    """Loads `config_file`, its includes and `bindings` into gin, later ones winning; on an error it loads nothing.

    Args:
      config_file: The experiment's gin file.
      bindings: Lines as on the command line, e.g. `train.num_iterations = 100`.
      search_path: Folders in which `include` searches, after `config_file`'s own.

    Raises:
      RoleError: A name, a type, a range or the syntax is wrong (USAGE). The message names the place, the binding and
        the nearest valid name.
    """
    search_path = [config_file.parent.resolve(), *search_path]
    with gin.unlock_config():  # the files' imports may register new configurables
        read = list(_read_bindings(config_file, search_path, including=()))
        for line in bindings:
            read.extend(_parse(line, COMMAND_LINE, search_path, including=()))
    _check_names(read)
    _check_values(read)

    gin.clear_config()
    # gin searches the working directory first, and can only append folders.
    gin.config._LOCATION_PREFIXES[:] = map(str, search_path)
    logging.disable(logging.CRITICAL)  # gin logs an error for every folder without the file
    try:
        gin.parse_config_files_and_bindings([str(config_file.resolve())], list(bindings), finalize_config=False)
    except Exception as error:  # gin raises many kinds of errors; the checks above catch most causes
        raise RoleError(f"{config_file}: {error}", ExitCode.USAGE) from error
    finally:
        logging.disable(logging.NOTSET)


def split_bindings(text: str) -> list[str]:
    """Returns the bindings in `text`, separated by new lines or by semicolons outside quotes."""
    return [part.strip() for part in _UNDIVIDED.findall(text) if part.strip()]


def operative_config() -> str:
    """Returns the values that this process used, defaults included, and the other roles' bindings, as a gin file."""
    # gin's operative_config_str leaves out what this process did not call. (gin-config is pinned.)
    return gin.config._config_str({**gin.config._CONFIG, **gin.config._OPERATIVE_CONFIG})


def _read_bindings(path: Path, search_path: Sequence[Path], including: tuple[Path, ...]) -> Iterator[Binding]:
    if path in including:
        raise RoleError(f"{path} includes itself, through {', '.join(map(str, including))}", ExitCode.USAGE)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RoleError(f"cannot read the gin file {path}: {error}", ExitCode.USAGE) from error
    yield from _parse(text, str(path), search_path, (*including, path))


def _parse(text: str, source: str, search_path: Sequence[Path], including: tuple[Path, ...]) -> Iterator[Binding]:
    """Yields the bindings of `text`, with those of its includes in place, and runs its imports."""
    try:
        statements = list(config_parser.ConfigParser(text, _KeepNames()))
    except (SyntaxError, ValueError, tokenize.TokenError) as error:
        # A bracket that is never closed is a TokenError: (message, (line, column)).
        line = error.args[1][0] if isinstance(error, tokenize.TokenError) else getattr(error, "lineno", None)
        place = f"{source}:{line}" if line and source != COMMAND_LINE else source
        reason = str(getattr(error, "msg", None) or error.args[0] if error.args else error).strip()
        raise RoleError(
            f"{place}: cannot be read as gin: {reason}: '{text.strip() if source == COMMAND_LINE else ''}'".rstrip(
                ": '"
            )
            + ". Expected lines such as `train.num_iterations = 1000`; strings need quotes.",
            ExitCode.USAGE,
        ) from error
    for statement in statements:
        place = source if source == COMMAND_LINE else f"{source}:{statement.location.line_num}"
        if isinstance(statement, config_parser.BindingStatement):
            yield Binding(statement.scope, statement.selector, statement.arg_name, statement.value, place)
        elif isinstance(statement, config_parser.IncludeStatement):
            yield from _read_bindings(_find(statement.filename, search_path, place), search_path, including)
        elif isinstance(statement, config_parser.ImportStatement):
            try:
                with gin.unlock_config():  # an earlier experiment may have locked it
                    importlib.import_module(statement.module)
            except ImportError as error:
                raise RoleError(
                    f"{place}: cannot import '{statement.module}': {error}. "
                    "Is its package installed, and the name right?",
                    ExitCode.USAGE,
                ) from error


def _find(filename: str, search_path: Sequence[Path], place: str) -> Path:
    for folder in search_path:
        if (folder / filename).is_file():
            return folder / filename
    known = sorted(
        os.path.relpath(p, folder) for folder in search_path if folder.is_dir() for p in folder.rglob("*.gin")
    )
    raise RoleError(
        f"{place}: there is no gin file '{filename}' in {', '.join(map(str, search_path))}.{_nearest(filename, known)}",
        ExitCode.USAGE,
    )


def _check_names(bindings: Sequence[Binding]) -> None:
    used_macros = {macro for binding in bindings for macro in _macros_in(binding.value)}
    defined_macros = {binding.selector for binding in bindings if not binding.parameter}
    for binding in bindings:
        if not binding.parameter:
            if binding.selector not in used_macros:
                raise RoleError(
                    f"{binding.place}: there is no '{binding.name}'."
                    f"{_nearest(binding.selector, used_macros, _all_parameters())}",
                    ExitCode.USAGE,
                )
        else:
            configurable = _configurable(binding.selector, binding)
            parameters = _parameters(configurable)
            if parameters is not None and binding.parameter not in parameters:
                raise RoleError(
                    f"{binding.place}: '{binding.selector}' has no parameter '{binding.parameter}' ({binding.name})."
                    f"{_nearest(binding.parameter, parameters, prefix=binding.selector + '.')}",
                    ExitCode.USAGE,
                )
        for macro in _macros_in(binding.value):
            # A macro may also be a gin constant, such as an enum's member.
            if macro not in defined_macros and not gin.config._CONSTANTS.matching_selectors(macro):
                raise RoleError(
                    f"{binding.place}: {binding.name} takes its value from %{macro}, which is not defined."
                    f"{_nearest(macro, defined_macros)}",
                    ExitCode.USAGE,
                )
        for reference in _leaves(binding.value, _Reference):
            _configurable(reference.name.split("/")[-1], binding)


def _check_values(bindings: Sequence[Binding]) -> None:
    """Checks the winning value of each parameter, following macros to their definitions."""
    macros = {binding.selector: binding for binding in bindings if not binding.parameter}
    winning = {
        (binding.scope, binding.selector, binding.parameter): binding for binding in bindings if binding.parameter
    }
    for binding in winning.values():
        value, place, name = binding.value, binding.place, binding.name
        while isinstance(value, _Macro):
            source = macros.get(value.name)
            if source is None:  # a gin constant
                break
            value, place, name = source.value, source.place, f"{source.name} (for {binding.name})"
        if _leaves(value, (_Macro, _Reference)):
            continue  # an object, checked by its receiver
        annotation = _annotations(_configurable(binding.selector, binding)).get(binding.parameter)
        problem = expectation_unmet(value, annotation)
        if problem:
            raise RoleError(f"{place}: {name} = {value!r}: expected {problem}", ExitCode.USAGE)


def expectation_unmet(value: Any, annotation: Any) -> Optional[str]:
    """Returns what `annotation` expects and `value` is not, in words; None if it fits or cannot be checked."""
    if annotation is None or annotation is Any or annotation is inspect.Parameter.empty:
        return None
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        base, *constraints = arguments
        problem = expectation_unmet(value, base)
        bounds = list(_bounds(constraints))
        words = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds)
        if problem:
            return f"{problem} {words}".rstrip()
        return None if all(_COMPARE[sign](value, bound) for sign, bound in bounds) else f"a number {words}"
    if origin is Union:
        problems = [expectation_unmet(value, argument) for argument in arguments]
        return None if None in problems else " or ".join(problem for problem in problems if problem)
    if origin is typing.Literal:
        return None if value in arguments else f"one of {', '.join(map(repr, arguments))}"
    if origin in (tuple, list, collections.abc.Sequence):
        if not isinstance(value, (tuple, list)):
            return f"a tuple such as (256, 256), not {_kind(value)}"
        element = next((argument for argument in arguments if argument is not Ellipsis), Any)
        return next(
            (f"each element to be {problem}" for problem in (expectation_unmet(v, element) for v in value) if problem),
            None,
        )
    if annotation is type(None):
        return None if value is None else "None"
    if annotation is bool:
        return None if isinstance(value, bool) else f"True or False, not {_kind(value)}"
    if annotation is int:
        return (
            None if isinstance(value, int) and not isinstance(value, bool) else f"a whole number, not {_kind(value)},"
        )
    if annotation is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
            return None
        return f"a number, not {_kind(value)},"
    if annotation is str:
        return None if isinstance(value, str) else f"a string in quotes, not {_kind(value)}"
    if inspect.isclass(annotation) and type(value) is not annotation and isinstance(value, _LITERALS):
        return f"a configurable reference such as @sac(), not {_kind(value)}"
    return None


_LITERALS = (str, int, float, tuple, list, dict)
_COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


def _bounds(constraints: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for constraint in constraints:
        parts = list(constraint) if isinstance(constraint, annotated_types.GroupedMetadata) else [constraint]
        for part in parts:
            for sign, field in ((">=", "ge"), (">", "gt"), ("<=", "le"), ("<", "lt")):
                if getattr(part, field, None) is not None:
                    yield sign, getattr(part, field)


def _kind(value: Any) -> str:
    return f"the {type(value).__name__} {value!r}"


def _leaves(value: Any, kind: Any) -> list[Any]:
    if isinstance(value, kind):
        return [value]
    if isinstance(value, dict):
        return [leaf for pair in value.items() for part in pair for leaf in _leaves(part, kind)]
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in _leaves(part, kind)]
    return []


def _macros_in(value: Any) -> list[str]:
    return [macro.name for macro in _leaves(value, _Macro)]


def _configurable(selector: str, binding: Binding) -> Any:
    """Returns the registered function or class that `selector` names."""
    # gin has no public list of its configurables. (gin-config is pinned.)
    registry = gin.config._REGISTRY
    matches = registry.matching_selectors(selector)
    if len(matches) == 1:
        return registry[matches[0]].wrapped
    if matches:
        raise RoleError(
            f"{binding.place}: '{selector}' in '{binding.name}' may mean {', '.join(sorted(matches))}; write it fully.",
            ExitCode.USAGE,
        )
    short = {key.rsplit(".", 1)[-1] for key in _our_selectors()}
    hint = (
        _nearest(binding.name, _all_parameters(), short)
        if selector == binding.selector
        else _nearest(selector, short, prefix="@")
    )
    raise RoleError(
        f"{binding.place}: there is no configurable '{selector}' ({binding.name}).{hint}",
        ExitCode.USAGE,
    )


def _our_selectors() -> list[str]:
    """Returns the configurables registered under "actorlearner", from which experiments are built."""
    return [selector for selector, _ in gin.config._REGISTRY.items() if selector.startswith("actorlearner.")]


def _all_parameters() -> list[str]:
    return [
        f"{selector.rsplit('.', 1)[-1]}.{parameter}"
        for selector in _our_selectors()
        for parameter in _parameters(gin.config._REGISTRY[selector].wrapped) or ()
    ]


def _parameters(configurable: Any) -> Optional[list[str]]:
    """Returns the parameters that may be bound; None if it takes any keyword."""
    parameters = inspect.signature(configurable).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [p.name for p in parameters if p.name != "self" and p.kind is not p.VAR_POSITIONAL]


def _annotations(configurable: Any) -> dict[str, Any]:
    function = configurable.__init__ if inspect.isclass(configurable) else configurable
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # other packages' annotations may use names that they do not import
        return {}


def _nearest(name: str, *names: Iterable[str], prefix: str = "") -> str:
    """Returns " Did you mean ...?", or all names if none is close and they are few."""
    candidates = sorted({candidate for group in names for candidate in group})
    last = {candidate.rsplit(".", 1)[-1]: candidate for candidate in reversed(candidates)}
    near = difflib.get_close_matches(name, candidates, n=1) or [
        last[match] for match in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(last), n=1)
    ]
    if near:
        return f" Did you mean '{prefix}{near[0]}'?"
    return (
        f" There are: {', '.join(prefix + candidate for candidate in candidates)}." if 0 < len(candidates) <= 20 else ""
    )
