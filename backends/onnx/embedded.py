"""Embedded weights: initialisers instead of graph inputs, with their bytes in one file beside the graphs.

All graphs of a folder share that file, in which equal memory stands once: entry points, batch sizes and
stages read the same weights.

A builder computes what it can at build time, and what it computes from a constant it keeps wide. So
- BF16 weights that a kernel widens are gathered by an index that is 0 only when the engine runs,
- bytes of codes, of which constants may only be dequantized, are: that is their value as a number.
Both fuse with what reads them, as if the weight were bound.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np
import onnx_ir as onnx

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.sources import load
from n3c.ir.program import Parameter

from .dtypes import ONNX_DTYPES
from .emit import OnnxEntry

WEIGHTS_FILE = "weights.data"
_PAGE = 4096
"""Bytes: tensors begin on pages, so that readers may map the file."""


class WeightsFile:
    """The file that is written once and read by every graph of its folder."""

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._file = (folder / WEIGHTS_FILE).open("wb")
        self._places: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def place(self, parameter: Parameter, memory: str) -> tuple[int, int]:
        """Return offset and length of the bytes of `parameter`, writing them when `memory` is met first.

        N3CError where the checkpoint has no such tensor, as for every reader of a source expression.
        """
        if memory not in self._places:
            data = np.ascontiguousarray(load(parameter, self._checkpoint))
            start = -(-self._file.tell() // _PAGE) * _PAGE
            self._file.seek(start)
            self._file.write(data.reshape(-1).view(np.uint8).data)
            self._places[memory] = (start, data.nbytes)
        return self._places[memory]

    def flush(self) -> None:
        """Make what was written readable to others."""
        self._file.flush()


def embed(entry: OnnxEntry, weights: WeightsFile) -> None:
    """Make the weights of `entry` initialisers of its model, which is changed. `entry` still tells which they are."""
    graph = entry.model.graph
    inputs = {value.name: value for value in graph.inputs}
    front, zero = _Front(graph), None
    for binding, parameter in zip(entry.weights, entry.parameters, strict=True):
        value = inputs[binding.name]
        shape = binding.shape
        graph.inputs.remove(value)
        if binding.dtype == "i8":
            one = front.constant(f"{value.name}/one", 1, np.float32)
            _read_through(front, value, "DequantizeLinear", one)
        elif binding.dtype == "bf16" and len(shape) > 1 and any(use.node.op_type == "Cast" for use in value.uses()):
            zero = zero or _zero_at_run_time(front, inputs[entry.arguments[0].name])
            shape = (1, *shape)
            _read_through(front, value, "Gather", zero, axis=0)
        offset, length = weights.place(parameter, binding.memory)
        dtype = ONNX_DTYPES[parameter.type.dtype]
        value.shape = onnx.Shape(shape)
        value.const_value = onnx.ExternalTensor(
            WEIGHTS_FILE, offset, length, dtype, shape=onnx.Shape(shape), name=binding.name
        )
        graph.register_initializer(value)
    weights.flush()


class _Front:
    """Nodes that are made first, in order; nodes that read weights go after them."""

    def __init__(self, graph: onnx.Graph) -> None:
        self._graph, self._first = graph, graph[0]

    def node(self, op: str, *operands: onnx.Value, name: str, **attributes: int) -> onnx.Value:
        """Add a node in front of what was there, after those added before."""
        node = onnx.node(op, operands, attributes, name=name, outputs=[onnx.val(name)])
        self._graph.insert_before(self._first, node)
        return node.outputs[0]

    def constant(self, name: str, number: float, dtype: type[np.generic]) -> onnx.Value:
        """Add a scalar."""
        tensor = onnx.tensor(np.array(number, dtype), name=name)
        value = onnx.val(name, tensor.dtype, (), const_value=tensor)
        self._graph.register_initializer(value)
        return value


def _read_through(front: _Front, value: onnx.Value, op: str, operand: onnx.Value, **attributes: int) -> None:
    """Let what reads `value` read `op` of it and `operand`."""
    uses = list(value.uses())
    made = front.node(op, value, operand, name=f"{value.name}/{op}", **attributes)
    for use in uses:
        use.node.replace_input_with(use.idx, made)


def _zero_at_run_time(front: _Front, source: onnx.Value) -> onnx.Value:
    """Return 0 as i64 that a builder cannot know: the least |x| of an input, but at most 0."""
    least = front.node("ReduceMin", front.node("Abs", source, name="zero/Abs"), name="zero/ReduceMin", keepdims=0)
    floats = source.dtype == onnx.DataType.FLOAT
    bound = front.constant("zero/bound", 0, np.float32 if floats else np.int64)
    zero = front.node("Min", least, bound, name="zero/Min")
    return front.node("Cast", zero, name="zero/Cast", to=onnx.DataType.INT64) if floats else zero
