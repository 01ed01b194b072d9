"""n3c init: a spec to start from."""

from __future__ import annotations

import re
from pathlib import Path

import click

import n3c.compiler
from n3c.compiler.cli import options
from n3c.compiler.cli.command import n3c_command
from n3c.compiler.cli.output import print_json, say, say_line, suggest
from n3c.specs.files import output_file, read_text, require_new, write_text
from n3c.specs.schema import NAME
from n3c.specs.shipped import spec_file

STARTER = Path(n3c.compiler.__file__).with_name("starter.toml")


@n3c_command(
    "init",
    "Write a commented spec to start from; its name is that of FILE. `-` prints it.",
    examples=(
        ("a small model of every common block", "n3c init my-model.toml"),
        ("a copy of Super to change", "n3c init my-super.toml --from super"),
    ),
)
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--from", "source", metavar="SPEC", help="Begin with a copy of this spec, as super (`n3c specs`).")
@click.option("--force", is_flag=True, help="Overwrite a file that is there.")
@options.common
def command(file: Path, source: str | None, force: bool, as_json: bool) -> None:
    """Write FILE."""
    begun = STARTER if source is None else spec_file(source)
    out = output_file(file)
    if out is not None:
        require_new(out, begun, force=force)
    text = read_text(begun)
    if re.fullmatch(NAME, file.stem):
        text = re.sub(r'^name = ".*"', f'name = "{file.stem}"', text, count=1, flags=re.MULTILINE)
    if out is not None:
        write_text(out, text)
    if as_json:
        print_json({"out": None if out is None else str(out), "spec": text})
    elif out is None:
        say(text, newline=False)
    else:
        say_line(f"{file}: {'a small model of every common block' if source is None else f'a copy of {source}'}")
    if out is not None:
        suggest(("check", out))
