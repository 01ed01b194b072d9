"""Signals that end a command: it cleans up, says so and exits with the documented code."""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager

_ENDING = ("SIGTERM", "SIGHUP")
"""`kill`, and a terminal that closes. Windows has no SIGHUP."""


@contextmanager
def interruptible() -> Generator[None]:
    """Let `kill` and a closing terminal interrupt as Ctrl-C does; what is ignored, as under nohup, stays ignored."""
    before = {
        number: handler
        for name in _ENDING
        if (number := getattr(signal, name, None)) is not None
        and (handler := signal.getsignal(number)) is not signal.SIG_IGN
    }
    for number in before:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
