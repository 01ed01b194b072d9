"""n3c serve: OpenAI's interface over HTTP."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from n3c.compiler.cli import options
from n3c.compiler.cli.command import n3c_command
from n3c.compiler.cli.output import print_json, tell
from n3c.compiler.cli.progress import TerminalProgress
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.runtime.numbers import require_number
from n3c.runtime.serve.open import open_served, require_packages

if TYPE_CHECKING:
    from n3c.runtime.serve.http_server import HttpServer

LOCAL = "127.0.0.1"


@n3c_command(
    "serve",
    "Serve BUILD with the weights of a checkpoint, by OpenAI's interface over HTTP.",
    examples=(
        ("on the CPU, at http://127.0.0.1:8000/v1", "n3c serve build/my-model --weights my-nvfp4"),
        (
            "to the network, on a GPU, for those who have the key in N3C_API_KEY",
            "n3c serve build/my-model --weights my-nvfp4 --device cuda --host 0.0.0.0",
        ),
    ),
    groups={
        "Network": ("--host", "--port", "--grace", "--access-log"),
        "Limits": ("--queue", "--max-body", "--max-n"),
        "Prefix cache": ("--cache-memory", "--no-prefix-cache"),
        "Trust": ("--api-key", "--allow-weight-updates", "--parse-special"),
    },
)
@options.of(open_served)
@click.option("--host", default=LOCAL, show_default=True, help="Address to listen at; 0.0.0.0: all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option(
    "--grace", type=click.FloatRange(0, 86400), default=30.0, show_default=True, help="Seconds for running requests."
)
@click.option("--access-log", is_flag=True, help="Log a line for each request, without what is in it.")
@options.common
def command(build: Path, host: str, port: int, grace: float, access_log: bool, as_json: bool, **_: Any) -> int:
    """Serve BUILD until SIGTERM or Ctrl-C."""
    require_packages()
    require_number("--grace", grace)
    from n3c.runtime.serve.http_server import HttpServer, bound

    with _address_told(host, port):
        listening = bound(host, port)  # before the minutes that loading takes
    with listening:
        with TerminalProgress() as progress:
            served = open_served(**{"weights": None} | options.given(open_served), progress=progress)
        try:
            with _address_told(host, port):
                server = HttpServer(served, listening, grace=grace, access_log=access_log)
        except N3CError:
            served.close()
            raise
        _run(server, host, as_json)
    return ExitCode.OK


@contextmanager
def _address_told(host: str, port: int) -> Generator[None]:
    """Raise N3CError (E0844, exit code 2) where the address cannot be had."""
    try:
        yield
    except OSError as error:
        message = f"cannot listen at {host}:{port}: {error.strerror or error}"
        raise N3CError(Diagnostic("E0844", message, help="choose another --port"), ExitCode.USAGE) from error


def _run(server: HttpServer, host: str, as_json: bool) -> None:
    """Serve to the end; say where, when requests are taken."""
    served = server.served

    def ready() -> None:
        if as_json:
            print_json({"ok": True, "url": server.url, "model": served.name, "diagnostics": []})
        else:
            tell(f"{served.name} at {server.url}/v1")
        if host != LOCAL and served.api_key is None:
            tell("everyone who reaches this address may use it: give --api-key")

    server.run(ready)
