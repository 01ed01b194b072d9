"""What a command of n3c has besides its work: examples, options in groups, and with --verbose its time and memory."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from n3c.backends.machine import peak_rss_bytes

from .output import chosen, tell
from .table import format_peak

WORDS = {
    "SPEC": "A TOML file, the name of a spec that n3c ships (`n3c specs`), or - for standard input.",
    "CHECKPOINT": "A folder with config.json and *.safetensors, or a hub id that is in the cache.",
    "CHECKPOINT_DIR": "A folder with config.json.",
    "CONFIG_JSON": "A config.json of Hugging Face's nemotron_h.",
    "BUILD": "A folder that `n3c build` wrote.",
    "A": "A spec, a checkpoint or a build.",
    "B": "Another one.",
    "FILE": "The file to write.",
}
"""Word for an argument → what can be given."""
_TERM = 26
"""Characters of the longest option beside which its help begins; below a longer one it does."""
_ALL_COMMANDS = ("--json", "--quiet", "--verbose", "--debug", "--help")


class Command(click.Command):
    """A command whose help is in groups and ends with examples."""

    def __init__(
        self,
        *arguments: Any,
        examples: Sequence[tuple[str, str]] = (),
        groups: Mapping[str, Sequence[str]] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(*arguments, **more)
        self.examples = examples
        """What each does, and the line that does it."""
        self.groups = groups or {}
        """Title → the options below it, in the order of the help; those of no group come first."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; UsageError for --quiet with --verbose."""
        if chosen("quiet") and chosen("verbose"):
            raise click.UsageError("--quiet and --verbose: give one of them", ctx)
        start = time.perf_counter()
        try:
            return super().invoke(ctx)
        finally:
            if chosen("verbose"):
                tell(f"{time.perf_counter() - start:.2f} s{format_peak(peak_rss_bytes())}")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the arguments, and the options in their groups."""
        given = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Argument)]
        words = [word for argument in given for word in re.findall(r"[A-Z_]+", argument.make_metavar(ctx))]
        left = {
            max(option.opts, key=len): option for option in self.get_params(ctx) if isinstance(option, click.Option)
        }
        grouped = {title: [left.pop(flag) for flag in flags] for title, flags in self.groups.items()}
        last = [left.pop(flag) for flag in _ALL_COMMANDS if flag in left]
        sections = {
            title: [row for option in options if (row := option.get_help_record(ctx)) is not None]
            for title, options in {"Options": [*left.values()], **grouped, "Options of all commands": last}.items()
        }
        _write_sections({"Arguments": [(word, WORDS[word]) for word in words if word in WORDS], **sections}, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, as they would be typed."""
        if self.examples:
            with formatter.section("Examples"):
                indent = " " * formatter.current_indent
                formatter.write("\n".join(f"{indent}# {does}\n{indent}{line}\n" for does, line in self.examples))


def _write_sections(sections: Mapping[str, Sequence[tuple[str, str]]], formatter: click.HelpFormatter) -> None:
    """Write lists of terms and what they mean, all in the same columns; no option is cut at its hyphens."""
    import textwrap  # only helps need it

    column = max((len(term) for rows in sections.values() for term, _ in rows if len(term) <= _TERM), default=0) + 4
    for title, rows in sections.items():
        if not rows:
            continue
        with formatter.section(title):
            for term, meaning in rows:
                lines = textwrap.wrap(meaning, formatter.width - column, break_on_hyphens=False)
                first = [f"  {term:<{column - 2}}{lines.pop(0)}" if len(term) <= column - 4 else f"  {term}"]
                formatter.write("".join(f"{line}\n" for line in [*first, *(f"{'':<{column}}{line}" for line in lines)]))


def n3c_command(
    name: str, help: str, *, examples: Sequence[tuple[str, str]], groups: Mapping[str, Sequence[str]] | None = None
) -> Callable[[Callable[..., Any]], Command]:
    """Return the decorator that makes a `Command` of a function."""
    return click.command(name, cls=Command, help=help, examples=examples, groups=groups)
