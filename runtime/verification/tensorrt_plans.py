"""The plans of a build on a GPU as an implementation: their outputs and no layers, which a plan does not show."""

from __future__ import annotations

import numpy as np

from n3c.ir.program import Program
from n3c.runtime.engines.interface import Engine, call

from .call_inputs import CallInputs
from .implementation import Rounding
from .scenario import Step
from .tolerance import Tolerance
from .trace import Trace


class TensorRTPlans:
    """Runs an engine of plans from their own states on, since those lie in the memory of a GPU."""

    name = "TensorRT plans"
    rounding: Rounding = "as deployed"

    def __init__(self, program: Program, engine: Engine, tolerance: Tolerance) -> None:
        self._program, self._engine, self._inputs = program, engine, CallInputs(program)
        self.tolerance = tolerance
        self.reset()

    def reset(self) -> None:
        """Begin new sequences: zero states."""
        self._engine.reset()
        self._inputs.reset()

    def run(self, step: Step, reference: Trace) -> Trace | None:
        """Run the plans of the step's entry point; what they give stands for the layer that gives it."""
        outputs = call(self._engine, step.entry, **self._inputs.of(step))
        self._inputs.keep_hidden(step, outputs)
        made = {name: c.label for c in self._program.entry_points[step.entry].calls for name in c.outputs}
        return {made[name]: np.asarray(value) for name, value in outputs.items()}
