"""Programs on a terminal of 80 columns."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios
import time
from collections.abc import Callable

from support.command import default_signals

OURS = ("CI", "FORCE_COLOR", "NO_COLOR", "COLUMNS", "LINES")
"""What the surroundings of the tests may set, and what terminals are told apart by."""


def on_terminal(
    command: list[str], act: Callable[[str, subprocess.Popen[bytes]], None] | None = None, **environment: str
) -> tuple[int, str]:
    """Run `command` on a terminal; `act` sees all output so far after each piece. Returns exit code and output."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    variables = {key: value for key, value in os.environ.items() if key not in OURS}
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=variables | environment, preexec_fn=default_signals
    ) as process:
        os.close(theirs)
        seen, end = "", time.monotonic() + 60
        while time.monotonic() < end:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # Linux: the other side is closed
                break
            seen += piece.decode()
            if act is not None:
                act(seen, process)
        process.kill()
    os.close(ours)
    return process.returncode, seen
