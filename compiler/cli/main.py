"""The command line: commands are loaded when called, errors become diagnostics and exit codes here only."""

from __future__ import annotations

import gc
import importlib
import io
import os
import sys
from collections.abc import Sequence

import click

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span

from .output import print_failure, tell
from .signals import interruptible

SECTIONS = {
    "Begin": {
        "init": "Write a commented spec to start from.",
        "specs": "List the specs that n3c ships, each usable by its name.",
        "import": "Turn a Hugging Face config into a spec.",
        "doctor": "Say what this machine can do.",
    },
    "Look": {
        "check": "Find everything that would fail later, without weights, GPU or build.",
        "inspect": "Count parameters, FLOPs, weight and state bytes.",
        "diff": "Say what changed between two specs, checkpoints or builds.",
    },
    "Make": {
        "build": "Compile a spec to PyTorch, ONNX or TensorRT.",
        "quantize": "Quantize a checkpoint to NVFP4 or FP8, in ModelOpt's layout.",
        "export-config": "Turn a spec into a Hugging Face config.json.",
    },
    "Prove": {
        "verify": "Compare all implementations of a model, layer by layer.",
        "repro": "Build again what a build was made of, and compare every file.",
    },
    "Run": {
        "run": "Generate text with a build and the weights of a checkpoint.",
        "serve": "Serve a build by OpenAI's interface over HTTP.",
        "bench": "Measure how fast an engine runs a build.",
        "simulate": "Say what a service of many GPUs would do, on paper.",
    },
    "Tools": {
        "passes": "List the passes.",
        "schema": "Print the JSON Schema of specs.",
        "completion": "Print the script that completes n3c in a shell.",
    },
}
"""Section of the help → command → what it does."""
COMMANDS = {name: summary for section in SECTIONS.values() for name, summary in section.items()}


class LazyGroup(click.Group):
    """A group whose commands live in `n3c.compiler.cli.commands`, one module each, imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"n3c.compiler.cli.commands.{command_module(cmd_name)}")
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands, section by section, without importing them."""
        indent = max(map(len, COMMANDS)) + 2
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(f"{name:<{indent - 2}}", summary) for name, summary in commands.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that `args` begin with; NoSuchCommand names those that are spelled like it."""
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as error:
            raise click.exceptions.NoSuchCommand(error.command_name, possibilities=COMMANDS, ctx=ctx) from None


def command_module(command: str) -> str:
    """Return the module of a command; `import` is a keyword of Python."""
    return "import_" if command == "import" else command.replace("-", "_")


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
    gc.set_threshold(50_000)  # programs hold few cycles, and looking for them at every 700 objects takes 4 % of `check`
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character still gets the rest
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with interruptible():
        code = run(arguments)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code; nothing is raised, --debug prints tracebacks."""
    as_json = "--json" in arguments
    try:
        result = cli.main(args=list(arguments), prog_name="n3c", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        tell(error.ctx.get_help() if error.ctx else "")
        return ExitCode.USAGE
    except SystemExit:  # click's answer where --help or --version has lost its reader
        return ExitCode.OK
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            import traceback

            tell(traceback.format_exc())
        return print_failure(_explained(error), as_json)
    return result if isinstance(result, int) else ExitCode.OK


def _explained(error: BaseException) -> N3CError:
    """Return what was raised as an error with a code."""
    if isinstance(error, N3CError):
        return error
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        usage = f"see `{context.command_path if context else 'n3c'} --help`"
        return N3CError(Diagnostic("E0701", error.format_message(), help=usage), ExitCode.USAGE)
    if isinstance(error, ModuleNotFoundError):
        help_ = "`n3c doctor` lists what is installed; `make venv` installs everything"
        missing = Diagnostic("E0509", f"the Python package `{error.name}` is not installed", help=help_)
        return N3CError(missing, ExitCode.TARGET)
    if isinstance(error, OSError):
        place = Span(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else None
        return N3CError(Diagnostic("E0616", f"file error: {error.strerror or error}", place), ExitCode.FILE)
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return N3CError(Diagnostic("E0702", "interrupted"), ExitCode.INTERNAL)
    help_ = "this is a fault of n3c; run again with --debug and report the traceback"
    message = f"internal error: {type(error).__name__}: {error}"
    return N3CError(Diagnostic("E0001", message, help=help_), ExitCode.INTERNAL)
