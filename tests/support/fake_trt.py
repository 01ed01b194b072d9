"""TensorRT's runtime and GPUs, played by ONNX Runtime and host memory: a "plan" is an ONNX file in float32.

Everything up to the kernels is real: addresses, sizes, order, what is written where. An address outside of what was
allocated on the device of the plan, an input that was not set, a stream or a current device that is another one fails.
A CUDA graph keeps the addresses and shapes of its capture. Capturing what has not run before fails, and so does a
replay while other addresses or shapes are bound: it would read and write where the captured call did.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np
import onnx

from n3c.runtime.engines.interface import Array
from n3c.runtime.engines.onnxruntime.session import inference_session

TYPES: Mapping[int, type[np.generic]] = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.INT64: np.int64}


class HostMemory:
    """A piece of host memory that begins on a multiple of 256."""

    def __init__(self, size: int) -> None:
        self._raw = np.zeros(size + 256, np.uint8)
        skip = -self._raw.ctypes.data % 256
        self.data = self._raw[skip : skip + size]
        self.address = int(self.data.ctypes.data)
        self.bytes = size


class HostDevice:
    """A GPU of SM 120 that is none. `captured` counts the graphs, `replayed` their launches, `received` its copies."""

    sm = 120
    in_use: ClassVar[list[HostDevice]] = []
    """The current device, last."""

    def __init__(self, index: int = 0) -> None:
        self.stream = 77 + index
        self.memories: list[HostMemory] = []
        self.captured = self.replayed = self.received = 0
        self.recording: list[tuple[_Context, Bound]] | None = None
        """Calls that a capture has enqueued so far; None outside of one."""

    @contextmanager
    def current(self) -> Generator[None]:
        self.in_use.append(self)
        try:
            yield
        finally:
            self.in_use.pop()

    def allocate(self, size: int) -> HostMemory:
        self.memories.append(HostMemory(size))
        return self.memories[-1]

    def write(self, memory: Any, offset: int, data: Array) -> None:
        assert self.recording is None, "a graph would write these values again"
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        assert offset + raw.size <= memory.bytes
        memory.data[offset : offset + raw.size] = raw

    def read(self, memory: Any, offset: int, size: int) -> bytes:
        assert self.recording is None, "reading waits for the stream, which a capture forbids"
        return bytes(memory.data[offset : offset + size].tobytes())

    def copy(self, memory: Any, offset: int, source: Any, source_offset: int, size: int) -> None:
        memory.data[offset : offset + size] = source.data[source_offset : source_offset + size]

    def receive(self, memory: Any, sender: Any, source: Any) -> None:
        assert memory in self.memories and source in sender.memories
        assert memory.bytes == source.bytes
        memory.data[:] = source.data
        self.received += 1

    def zero(self, memory: Any) -> None:
        memory.data[:] = 0

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        recorded: list[tuple[_Context, Bound]] = []
        self.recording = recorded
        try:
            work()
        finally:
            self.recording = None
        assert recorded, "an empty graph"

        def replay() -> None:
            self.replayed += 1
            for context, bound in recorded:
                context.replay(bound)

        return replay

    def holds(self, address: int, size: int) -> bool:
        return any(m.address <= address and address + size <= m.address + m.bytes for m in self.memories)


class FakeTrt:
    """The part of the `tensorrt_rtx` module that runs plans."""

    __name__, __version__ = "tensorrt_rtx", "1.0.fake"

    def __init__(self) -> None:
        self.fails = False
        """Whether executions fail."""

        class Logger:
            ERROR = 1

            def __init__(self, severity: int) -> None:
                self.severity = severity

        self.Logger = Logger

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        return _Runtime(self, HostDevice.in_use[-1])


class _Runtime:
    def __init__(self, trt: FakeTrt, device: HostDevice) -> None:
        self._trt, self._device = trt, device

    def deserialize_cuda_engine(self, data: bytes) -> Any:
        try:
            return _Engine(self._trt, self._device, onnx.load_from_string(data))
        except Exception:
            return None


class _Engine:
    def __init__(self, trt: FakeTrt, device: HostDevice, model: Any) -> None:
        self._trt, self._device, self.model = trt, device, model

    def create_execution_context(self) -> Any:
        return _Context(self._trt, self._device, self.model)


@dataclass(frozen=True)
class Bound:
    """The addresses and shapes of one execution."""

    addresses: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]


class _Context:
    def __init__(self, trt: FakeTrt, device: HostDevice, model: Any) -> None:
        self._session: Any = inference_session(model.SerializeToString())
        self._trt, self._device, self._graph = trt, device, model.graph
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._ran: list[Bound] = []

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self._device.stream
        assert HostDevice.in_use[-1] is self._device
        if self._trt.fails:
            return False
        bound = Bound(dict(self._addresses), dict(self._shapes))
        if self._device.recording is not None:
            assert bound in self._ran, "captured before it ran: a first execution may allocate"
            self._device.recording.append((self, bound))
            return True
        self._ran.append(bound)
        self._execute(bound)
        return True

    def replay(self, bound: Bound) -> None:
        assert HostDevice.in_use[-1] is self._device
        assert bound.addresses == self._addresses, "the graph was captured with other addresses"
        assert bound.shapes == self._shapes, "the graph was captured with other shapes"
        self._execute(bound)

    def _execute(self, bound: Bound) -> None:
        feeds = {value.name: self._array(value, bound).copy() for value in self._graph.input}
        for value, result in zip(self._graph.output, self._session.run(None, feeds), strict=True):
            self._array(value, bound)[...] = result

    def _array(self, value: Any, bound: Bound) -> Array:
        tensor = value.type.tensor_type
        shape = bound.shapes.get(value.name) or tuple(d.dim_value for d in tensor.shape.dim)
        dtype = np.dtype(TYPES[tensor.elem_type])
        address, size = bound.addresses[value.name], prod(shape) * dtype.itemsize
        assert self._device.holds(address, size), value.name
        array: Array = np.ctypeslib.as_array((ctypes.c_byte * size).from_address(address)).view(dtype).reshape(shape)
        return array
