"""The builder's logger, monitor and writer, as subclasses made from the module that was loaded.

C++ calls them, from the thread that builds: they only take notes and never raise.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

LISTING = "Layers:"
"""How the builder's message with the listing begins."""

_ERROR = 1
"""Severities of ILogger: 0 internal error, 1 error, 2 warning, 3 info, 4 verbose."""
_KEPT = 64
"""Errors that are kept, so that a build that complains without end stays small."""
_SILENCE = 1.0
"""Seconds without an event after which the builder is in its one long step, which has none."""
COMPILING = "Compiling kernels"
_FIGURES = ("Max Scratch Memory: ", "Total Activation Memory: ")


class Captured:
    """The messages of a build that matter: errors, memory figures and the layer listing."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.figures: dict[str, int] = {}
        """Figure → bytes."""
        self.listing = ""

    def take(self, severity: int, message: str) -> None:
        """Keep `message` if it matters."""
        if severity <= _ERROR:
            if len(self.errors) < _KEPT:
                self.errors.append(message)
        elif message.startswith(LISTING):
            self.listing = message
        elif message.startswith(_FIGURES):
            figure, _, rest = message.partition(": ")
            number = rest.split(" ", 1)[0]
            self.figures[figure] = int(number) if number.isdigit() else 0


def make_logger(trt: Any, captured: Captured) -> Any:
    """Return an ILogger that hands everything to `captured`."""

    def log(_self: Any, severity: Any, message: str) -> None:
        captured.take(int(severity), message)

    return _subclass(trt.ILogger, "CapturingLogger", log=log)


@dataclass(frozen=True, slots=True)
class BuilderStep:
    """Where the builder is: `done` of `total` steps of `phase`."""

    phase: str
    done: int
    total: int


class Steps:
    """Progress of the builder, written by its thread and read by the waiting one, and the request to cancel."""

    def __init__(self) -> None:
        self.cancelled = False
        self._at = ("Starting", 0, 0)
        self._last = time.perf_counter()

    def begin(self, phase: str, total: int) -> None:
        """A phase of `total` steps begins; phases nest, the innermost is told."""
        self._at, self._last = (phase, 0, total), time.perf_counter()

    def step(self, phase: str, done: int) -> bool:
        """Steps of `phase` are done; return whether to go on."""
        known, _, total = self._at
        self._at, self._last = (phase, done, total if known == phase else 0), time.perf_counter()
        return not self.cancelled

    def now(self) -> BuilderStep:
        """Return the last event; `COMPILING` where none came for a while."""
        silent = time.perf_counter() - self._last >= _SILENCE
        return BuilderStep(COMPILING, 0, 0) if silent else BuilderStep(*self._at)


def make_monitor(trt: Any, steps: Steps) -> Any:
    """Return an IProgressMonitor that hands everything to `steps`."""

    def phase_start(_self: Any, phase: str, _parent: str | None, total: int) -> None:
        steps.begin(phase, total)

    def step_complete(_self: Any, phase: str, step: int) -> bool:
        return steps.step(phase, step + 1)

    def phase_finish(_self: Any, _phase: str) -> None:
        return

    return _subclass(
        trt.IProgressMonitor, "Monitor", phase_start=phase_start, step_complete=step_complete, phase_finish=phase_finish
    )


def make_writer(trt: Any, write: Any) -> Any:
    """Return an IStreamWriter that hands each piece of the plan to `write(bytes) -> int`."""

    def write_piece(_self: Any, piece: Any) -> int:
        return int(write(piece))

    return _subclass(trt.IStreamWriter, "FileWriter", write=write_piece)


def _subclass(base: Any, name: str, **methods: Any) -> Any:
    """Return an instance of a subclass of an extension type, whose own `__init__` must run."""

    def initialise(self: Any) -> None:
        base.__init__(self)

    return type(name, (base,), {"__init__": initialise, **methods})()
