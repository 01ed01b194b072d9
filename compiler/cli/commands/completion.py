"""n3c completion: what a shell needs to complete commands, options and shipped specs."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from n3c.compiler.cli import options
from n3c.compiler.cli.command import n3c_command
from n3c.compiler.cli.output import print_json, say

SHELLS = ("bash", "zsh", "fish")


@n3c_command(
    "completion",
    "Print the script that completes n3c's commands, options and specs in SHELL: bash, zsh or fish.",
    examples=(
        ("in ~/.bashrc", 'eval "$(n3c completion bash)"'),
        ("in ~/.zshrc, after compinit", 'eval "$(n3c completion zsh)"'),
        ("for fish", "n3c completion fish > ~/.config/fish/completions/n3c.fish"),
    ),
)
@click.argument("shell", metavar="SHELL", type=click.Choice(SHELLS))
@options.common
def command(shell: str, as_json: bool) -> None:
    """Print the script of SHELL."""
    group = click.get_current_context().find_root().command
    kind = get_completion_class(shell)
    assert kind is not None
    completion = kind(group, {}, "n3c", "_N3C_COMPLETE")
    script = completion.source_template % completion.source_vars()  # `source()` would start bash for its version
    print_json({"shell": shell, "script": script}) if as_json else say(script.strip())
