"""Options of the command line, made of the signatures of the Python API."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

import click

from n3c.runtime.options import Argument, Option, Parameter, flag, parameters_of

from .output import chosen, keep, tell

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

F = TypeVar("F", bound=Callable[..., Any])

_COMMON = (
    click.option("--json", "as_json", is_flag=True, callback=keep("json"), help="Print one JSON object on stdout."),
    click.option(
        "-q", "--quiet", is_flag=True, expose_value=False, callback=keep("quiet"),
        help="Print results, warnings and errors only: no progress, no next command.",
    ),
    click.option(
        "-v", "--verbose", is_flag=True, expose_value=False, callback=keep("verbose"),
        help="Print every step on a line of its own, and time and peak memory in the end.",
    ),
    click.option("--debug", is_flag=True, expose_value=False, callback=keep("debug"), help="Show tracebacks."),
)  # fmt: skip


def common(command: F) -> F:
    """Add --json, --quiet, --verbose and --debug, which every command has."""
    for option in reversed(_COMMON):
        command = option(command)
    return command


def show_traceback() -> None:
    """Print the traceback of the error that is handled, where --debug asks for it."""
    if chosen("debug"):
        import traceback

        tell(traceback.format_exc())


def of(function: Callable[..., object], *, several: bool = False) -> Callable[[F], F]:
    """Add the arguments and options that `function` of the API takes; the command gets their values by name.

    With `several` its argument may be given more than once, and the command gets a tuple.
    """

    def add(command: F) -> F:
        for parameter in reversed(parameters_of(function)):
            command = _decorator(parameter, several)(command)
        return command

    return add


def given(function: Callable[..., object]) -> dict[str, Any]:
    """Return the arguments for `function` that the user gave to the running command: the others have their defaults."""
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    return {
        parameter.name: context.params[parameter.name]
        for parameter in parameters_of(function)
        if context.get_parameter_source(parameter.name) is not default
    }


def overrides(given: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the words of the --set that were given, for a command that is to see the same spec."""
    return tuple(word for value in given.get("set", ()) for word in ("--set", value))


def _decorator(parameter: Parameter, several: bool) -> Callable[[F], F]:
    described = parameter.described
    if isinstance(described, Argument):
        kind, _ = _click_type(parameter.hint, Option(""))
        metavar, count = (f"{described.metavar}...", -1) if several else (described.metavar, 1)
        return click.argument(
            parameter.name,
            metavar=metavar,
            type=kind,
            required=parameter.required,
            nargs=count,
            shell_complete=complete_spec if "SPEC" in described.metavar else None,
        )
    kind, more = _click_type(parameter.hint, described)
    shown = parameter.default is not inspect.Parameter.empty and parameter.default not in ((), None)
    shown = shown and parameter.default is not False
    if shown:
        more |= {"default": parameter.default, "show_default": True}
    return click.option(
        *([described.short] if described.short else []),
        flag(parameter.name),
        parameter.name,
        type=kind,
        metavar=described.metavar or ("N" if isinstance(kind, (click.IntRange, click.FloatRange)) else None),
        required=parameter.required,
        help=described.help,
        **more,
    )


def _click_type(hint: Any, option: Option) -> tuple[click.ParamType[Any] | None, dict[str, Any]]:
    """Return click's type for a type of Python, and what else click must know."""
    members = get_args(hint)
    if hint is bool:
        return None, {"is_flag": True}
    if hint is int:
        return click.IntRange(_whole(option.least), _whole(option.most)), {}
    if hint is float:
        above = option.above is not None
        return click.FloatRange(option.above if above else option.least, option.most, min_open=above), {}
    if get_origin(hint) is Literal:
        return click.Choice(members) if option.added is None else _OpenChoice(members, option.added), {}
    if hint is Path or Path in members:
        return click.Path(path_type=Path), {}
    if get_origin(hint) is Sequence:
        return _click_type(members[0], option)[0], {"multiple": True}
    if get_origin(hint) is tuple:
        return _click_type(members[0], option)[0], {"nargs": len(members)}
    return click.STRING, {}


def complete_spec(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem[str]]:
    """Return the shipped specs that a word may become, and that it may be a file."""
    from click.shell_completion import CompletionItem  # only the completion of a shell needs it

    from n3c.specs.shipped import shipped_specs

    names = [CompletionItem(name) for name in shipped_specs() if name.startswith(begun)]
    return [CompletionItem(begun, type="file"), *names]


class _OpenChoice(click.Choice[str]):
    """A choice to which extensions add; these are looked for once a value is none of n3c's own."""

    def __init__(self, choices: Sequence[str], added: Callable[[], Collection[str]]) -> None:
        super().__init__(choices)
        self._added = added

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value; click.BadParameter for one that nobody has."""
        known = click.Choice(self.choices if value in self.choices else [*self.choices, *self._added()])
        return known.convert(value, param, ctx)


def _whole(bound: float | None) -> int | None:
    return None if bound is None else int(bound)
