"""An engine as an implementation: what it gives, and the states that it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from n3c.ir.program import Program
from n3c.runtime.engines.interface import Array, Engine, call

from .call_inputs import CallInputs
from .implementation import Rounding
from .scenario import Step
from .tolerance import Tolerance
from .trace import Trace


class EngineOutputs:
    """Runs an engine from its own states on, since those lie where it computes; its layers it does not show."""

    def __init__(
        self,
        name: str,
        rounding: Rounding,
        program: Program,
        engine: Engine,
        tolerance: Tolerance,
        states: Callable[[], Mapping[str, Array]] = dict,
    ) -> None:
        """Take what returns the states of the engine by name, where it shows them."""
        self.name = name
        self.rounding: Rounding = rounding
        self.tolerance = tolerance
        self._program, self._engine, self._states = program, engine, states
        self._inputs = CallInputs(program)
        self.reset()

    def reset(self) -> None:
        """Begin new sequences: zero states."""
        self._engine.reset()
        self._inputs.reset()

    def run(self, step: Step, reference: Trace) -> Trace | None:
        """Run the step's entry point; what it gives stands for the layer that gives it."""
        outputs = call(self._engine, step.entry, **self._inputs.of(step))
        self._inputs.keep_hidden(step, outputs)
        entry = self._program.entry_points[step.entry]
        made = {name: c.label for c in entry.calls for name in c.outputs}
        written = {name for c in entry.calls for name in c.states}
        states = {name: state for name, state in self._states().items() if name in written}
        return states | {made[name]: np.asarray(value) for name, value in outputs.items()}
