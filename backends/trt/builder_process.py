"""The process that builds one plan: standard input tells it which, standard output tells how it goes.

Both are pickles between a process and its own child. The input stays open as long as the parent lives, and the child
ends when it ends: nothing goes on building for nobody.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span

from .build import PlanResult, Range, build_plan
from .module import load_trt
from .targets import Flavour


@dataclass(frozen=True, slots=True)
class Order:
    """A plan to be built."""

    model: Path
    """The ONNX file."""
    plan: Path
    flavour: Flavour
    sms: tuple[int, ...]
    ranges: Mapping[str, Range]
    spans: Mapping[str, Span]
    """First part of a node's name → where the spec asked for it."""
    memory: int = 0
    """Bytes that its process will hold at most, as `builder_bytes` estimates."""

    def locate(self, node: str) -> Span | None:
        """Return the spec line that a node, by its name, comes from."""
        return self.spans.get(node.partition("/")[0])


@dataclass(frozen=True, slots=True)
class Step:
    """What the builder is at."""

    what: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class Refused:
    """The content of an N3CError: why there is no plan."""

    diagnostics: tuple[Diagnostic, ...]
    exit_code: ExitCode


Message = Step | PlanResult | Refused
"""What the process says: any number of steps, then one of the others."""


class _Sent:
    """Progress that goes to the parent."""

    def __init__(self, channel: IO[bytes]) -> None:
        self._channel = channel

    def phase(self, name: str) -> None:
        """Ignore it: a plan is one phase of its parent's."""

    def step(self, what: str, done: int = 0, total: int = 0) -> None:
        """Tell a step."""
        send(self._channel, Step(what, done, total))

    def item(self, what: str, done: int, total: int) -> None:
        """Ignore it: a plan has no items."""


def send(channel: IO[bytes], message: Message | Order) -> None:
    """Write a message at once."""
    channel.write(pickle.dumps(message))
    channel.flush()


def main() -> None:
    """Build the plan that standard input names."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts all processes; the parent ends this one
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no message
    order: Order = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        result = build_plan(
            order.model,
            order.plan,
            load_trt(order.flavour),
            sms=order.sms,
            ranges=order.ranges,
            progress=_Sent(channel),
            locate=order.locate,
        )
    except N3CError as error:
        send(channel, Refused(error.diagnostics, error.exit_code))
    else:
        send(channel, result)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)
