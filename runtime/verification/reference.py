"""The program of the spec, op by op: what implementations are compared with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from n3c.backends.onnx.entry_forms import fastest_for
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.ir.program import Program
from n3c.ir.types import DType
from n3c.passes.base import run_pipeline
from n3c.passes.serving import Served, serve
from n3c.passes.widen import Widen
from n3c.runtime.build_folder import OpenedBuild
from n3c.runtime.engines.interface import Array
from n3c.runtime.engines.reference.engine import ReferenceEngine
from n3c.runtime.engines.reference.engine_products import EngineProducts

from .call_inputs import CallInputs, without_padding
from .implementation import Rounding
from .scenario import Step
from .trace import Doubts, Trace


class Reference:
    """The reference evaluation of a program's entry points."""

    def __init__(self, program: Program, engine: ReferenceEngine, products: EngineProducts | None = None) -> None:
        """Take the choice of `engine`, where it rounds activations."""
        self._program, self._engine, self._inputs = program, engine, CallInputs(program)
        self._products = products
        self.doubts: Doubts = {}
        """Of the last step."""

    def reset(self) -> None:
        """Begin new sequences: zero states."""
        self._engine.reset()
        self._inputs.reset()

    def run(self, step: Step) -> Trace:
        """Evaluate the step's entry point; return what each call gave first, and every state after it."""
        entry = self._program.entry_points[step.entry]
        given = self._inputs.of(step)
        if self._products is not None:
            self._products.doubts.clear()
        outputs = self._engine.run(step.entry, {name: given[name] for name in entry.inputs})
        self._inputs.keep_hidden(step, outputs)
        assert self._engine.last is not None
        values, trace = self._engine.last.values, dict[str, Array]()
        for call in entry.calls:
            for name in call.outputs[:1]:
                trace[call.label] = without_padding(values[name].float().numpy(), step, entry)
            trace |= {name: self._engine.states[name].float().numpy() for name in call.states}
        self.doubts = self._doubts(step)
        return trace

    def _doubts(self, step: Step) -> Doubts:
        """Return the doubtful tokens: of a layer with states those behind one, too, and all where it rounds states."""
        found = dict[str, Array]()
        for call in self._program.entry_points[step.entry].calls:
            if self._products is None or call.label not in self._products.doubts:
                continue
            doubtful = self._products.doubts[call.label].numpy()[:, : step.tokens.shape[1]]
            if call.states:
                doubtful = np.logical_or.accumulate(doubtful, axis=1)
            if any(self._program.states[name].type.dtype is not DType.F32 for name in call.states):
                doubtful = np.ones_like(doubtful)
            found[call.label] = doubtful | found.get(call.label, False)
        return found


def weight_only(build: OpenedBuild) -> Served:
    """Return what a build serves, without rounding activations: implementations then agree to the order of sums."""
    serving = replace(build.spec.serving, activations="weight_only")
    return serve(replace(build.spec, serving=serving))


def references(build: OpenedBuild, checkpoint: Checkpoint, batch: int) -> dict[Rounding, Reference]:
    """Return the reference that rounds nothing but weights, and the one that rounds as what is deployed does."""
    program, capacity = build.served.program, build.spec.serving.max_seq_len
    wide = _float32(weight_only(build).program)
    products = EngineProducts(program, batch, fastest_for(program, build.sms))
    return {
        "none": Reference(wide, ReferenceEngine(wide, checkpoint, batch_sizes=[batch], capacity=capacity)),
        "as deployed": Reference(
            program,
            ReferenceEngine(program, checkpoint, batch_sizes=[batch], capacity=capacity, choice=products),
            products,
        ),
    }


def _float32(program: Program) -> Program:
    """Return a copy of the program in float32."""
    wide = program.extract(*program.entry_points.values())
    run_pipeline(wide, [Widen()])
    return wide
