"""The command line: commands are loaded when called, errors become diagnostics and exit codes here only."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import click

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError

from .output import print_failure

COMMANDS = {
    "check": "Find everything that would fail later, without weights, GPU or build.",
    "inspect": "Count parameters, FLOPs, weight and state bytes.",
    "build": "Compile a spec to PyTorch, ONNX or TensorRT.",
    "import": "Turn a Hugging Face config into a spec.",
    "export-config": "Turn a spec into a Hugging Face config.json.",
    "passes": "List the passes.",
    "schema": "Print the JSON Schema of specs.",
    "doctor": "Say what this machine can do.",
}


class LazyGroup(click.Group):
    """A group whose commands live in `n3c.compiler.commands`, one module each, imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"n3c.compiler.commands.{cmd_name.replace('-', '_')}_")
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _kebab(token: str) -> str:
    return token.replace("_", "-")


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"n3c {version('n3c')}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"token_normalize_func": _kebab, "help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Print the version."
)
def cli() -> None:
    """Compile one TOML spec of a hybrid Mamba-2 / attention / MoE model to PyTorch and TensorRT."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the documented code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(run(arguments))


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code; users' errors never raise."""
    as_json, debug = "--json" in arguments, "--debug" in arguments
    try:
        result = cli.main(args=list(arguments), prog_name="n3c", standalone_mode=False)
    except N3CError as error:
        if debug:
            raise
        return print_failure(error, as_json)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        return ExitCode.USAGE
    except click.ClickException as error:
        text = error.format_message()
        context = getattr(error, "ctx", None)
        usage = f"see `{context.command_path} --help`" if context else "see `n3c --help`"
        return print_failure(N3CError(Diagnostic("E0701", text, help=usage), ExitCode.USAGE), as_json)
    except (click.Abort, KeyboardInterrupt):
        return print_failure(N3CError(Diagnostic("E0702", "interrupted"), ExitCode.INTERNAL), as_json)
    except BrokenPipeError:
        sys.stderr.close()
        return ExitCode.OK
    except Exception as error:
        if debug:
            raise
        message = f"internal error: {type(error).__name__}: {error}"
        help_ = "this is a fault of n3c; run again with --debug and report the traceback"
        return print_failure(N3CError(Diagnostic("E0001", message, help=help_), ExitCode.INTERNAL), as_json)
    return result if isinstance(result, int) else ExitCode.OK
