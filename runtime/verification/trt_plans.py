"""The plans of a build on a GPU as a form of the model: their outputs and no layers, which a plan does not show."""

from __future__ import annotations

import numpy as np

from n3c.ir.program import Program
from n3c.runtime.engines.interface import Engine, call

from .implementation import Feeder
from .scenario import Step
from .trace import Trace


class TrtLeg:
    """Runs an engine of plans; `prefill` may quantize activations, which the tolerance behind it allows for."""

    name = "TensorRT plans"

    def __init__(self, program: Program, engine: Engine, tolerance: float, narrow_tolerance: float) -> None:
        self._program, self._engine, self._feeder = program, engine, Feeder(program)
        self._tolerances = (tolerance, max(tolerance, narrow_tolerance))
        self.reset()

    def reset(self) -> None:
        """Zero states."""
        self.tolerance = self._tolerances[0]
        self._engine.reset()
        self._feeder.reset()

    def run(self, step: Step) -> Trace | None:
        """Run the plans of the step's entry point; what they give stands for the layer that gives it."""
        if step.entry == "prefill":
            self.tolerance = self._tolerances[1]
        outputs = call(self._engine, step.entry, **self._feeder.inputs(step))
        self._feeder.keep(step, outputs)
        made = {name: c.label for c in self._program.entry_points[step.entry].calls for name in c.outputs}
        return {made[name]: np.asarray(value) for name, value in outputs.items()}
