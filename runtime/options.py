"""Parameters of the Python API that are options of the command line, described once for both.

A function of the API annotates each parameter with an `Option` (or `Argument`) and is decorated with `checked`.
The command line makes its options of the signature: name, type, default and help stand nowhere else. Modules with
such functions do without `from __future__ import annotations`, which would make texts of the descriptions.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, cast, get_args, get_origin

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError

from .numbers import out_of_range

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Needs:
    """A parameter without which another has no effect: it must be given, have one of `values`, or pass `test`."""

    parameter: str
    values: tuple[object, ...] = ()
    test: Callable[[Any], bool] | None = None
    said: str = ""
    """The condition of `test`, as a message states it."""

    def met(self, value: object) -> bool:
        """Whether the value of the parameter is one that is needed."""
        if self.test is not None:
            return self.test(value)
        return value in self.values if self.values else value is not None and value is not False

    def __str__(self) -> str:
        """Return it as typed: `--target onnx or trt`."""
        named = " or ".join(str(value) for value in self.values if value is not None)
        return self.said or f"{flag(self.parameter)} {named}".rstrip()


@dataclass(frozen=True, slots=True)
class Argument:
    """A parameter without a flag on the command line."""

    metavar: str


@dataclass(frozen=True, slots=True)
class Option:
    """A parameter with a flag on the command line, named as the parameter."""

    help: str
    short: str | None = None
    """`-o`."""
    metavar: str | None = None
    least: float | None = None
    above: float | None = None
    most: float | None = None
    needs: Needs | None = None
    added: Callable[[], Collection[str]] | None = None
    """Values that extensions add to the choices; asked for once a value is none of these."""

    def fault(self, value: object) -> str | None:
        """Return why a number is not within the bounds, or None where it is."""
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return None
        return out_of_range(value, least=self.least, above=self.above, most=self.most)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a function of the API."""

    name: str
    hint: Any
    """Its type, without None."""
    default: object
    """`inspect.Parameter.empty` for a parameter without a default."""
    required: bool
    """Whether there is neither a default nor None."""
    described: Option | Argument


def flag(name: str) -> str:
    """Return the flag of a parameter: `--max-new-tokens`."""
    return f"--{name.replace('_', '-')}"


@functools.cache
def parameters_of(function: Callable[..., object]) -> tuple[Parameter, ...]:
    """Return the parameters of a function that are described, in order."""
    found: list[Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        hint: Any = parameter.annotation
        if get_origin(hint) is Annotated:
            full, (described,) = hint.__origin__, hint.__metadata__
            required = parameter.default is parameter.empty and type(None) not in get_args(full)
            found.append(Parameter(name, _without_none(full), parameter.default, required, described))
    return tuple(found)


def _without_none(hint: Any) -> Any:
    members = [member for member in get_args(hint) if member is not type(None)]
    return functools.reduce(lambda a, b: a | b, members) if type(None) in get_args(hint) else hint


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse arguments that `function` describes and does not take.

    N3CError (E0701, exit code 2) for a value that is none of the choices or beyond the bounds, and for an argument
    that is given although it has no effect beside the others.
    """

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = inspect.signature(function).bind(*args, **kwargs)
        given = dict(bound.arguments)
        bound.apply_defaults()
        faults = _faults(parameters_of(function), given, bound.arguments)
        if faults:
            raise N3CError([_usage(fault) for fault in faults], ExitCode.USAGE)
        return function(*args, **kwargs)

    return called


def usage_error(message: str) -> N3CError:
    """Return the error (E0701, exit code 2) for arguments that do not go together."""
    return N3CError(_usage(message), ExitCode.USAGE)


_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def size_of(option: str, text: int | str) -> int:
    """Return the bytes of `5GB`, `500MB` or `1000000`, given for `option`; N3CError (exit code 2) for anything else."""
    found = re.fullmatch(r"(\d{1,15})\s*(|kb|mb|gb)", str(text).lower())
    if found is None or int(found[1]) == 0:
        raise usage_error(f"{option}: {text!r} is no size, as 5GB")
    return int(found[1]) * _UNITS[found[2]]


def _usage(message: str) -> Diagnostic:
    return Diagnostic("E0701", message)


def _faults(parameters: Sequence[Parameter], given: Mapping[str, object], values: Mapping[str, object]) -> list[str]:
    faults: list[str] = []
    for parameter in parameters:
        option, name = parameter.described, parameter.name
        if name not in given or isinstance(option, Argument):
            continue
        problem = _choice_fault(parameter.hint, given[name]) or option.fault(given[name])
        if problem is not None and option.added is not None and given[name] in option.added():
            problem = None
        if problem is not None:
            faults.append(f"{flag(name)}: {problem}")
        elif option.needs is not None and not option.needs.met(values[option.needs.parameter]):
            faults.append(f"{flag(name)} has no effect: it needs {option.needs}")
    return faults


def _choice_fault(hint: Any, value: object) -> str | None:
    if get_origin(hint) is Literal and value is not None and value not in get_args(hint):
        return f"{value!r} is none of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is Sequence and isinstance(value, (list, tuple)):
        entries = cast("Sequence[object]", value)
        return next((problem for entry in entries if (problem := _choice_fault(get_args(hint)[0], entry))), None)
    return None
