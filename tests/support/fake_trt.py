"""TensorRT's runtime and GPUs, played by host memory and ONNX Runtime: a "plan" is an ONNX file.

One in float32 runs in ONNX Runtime, one of narrower types in the ONNX reference evaluator, which knows them all.

Everything up to the kernels is real: addresses, sizes, order, what is written where. An address outside of what was
allocated on the device of the plan, an input that was not set, a stream or a current device that is another one fails.
A CUDA graph keeps the addresses and shapes of its capture. Capturing what has not run before fails, and so does a
replay while other addresses or shapes are bound: it would read and write where the captured call did. Capturing under
lazy specialization, or where the context says that it cannot, fails, and so does running without scratch.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from n3c.runtime.engines.interface import Array
from n3c.runtime.engines.onnxruntime.session import inference_session

TYPES: Mapping[int, Any] = {
    onnx.TensorProto.FLOAT: np.float32,
    onnx.TensorProto.INT64: np.int64,
    onnx.TensorProto.INT8: np.int8,
    onnx.TensorProto.BFLOAT16: ml_dtypes.bfloat16,
    onnx.TensorProto.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn,
}
WIDE = (onnx.TensorProto.FLOAT, onnx.TensorProto.INT64)


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

    def zero(self, memory: Any, offset: int, size: int) -> None:
        memory.data[offset : offset + size] = 0

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
        self.ExecutionContextAllocationStrategy = Strategies("STATIC", "USER_MANAGED")
        self.DynamicShapesKernelSpecializationStrategy = Strategies("LAZY", "EAGER", "NONE")
        self.CudaGraphStrategy = Strategies("DISABLED", "WHOLE_GRAPH_CAPTURE")
        self.capturable = True
        """Whether contexts may be captured."""
        self.scratch = [512, 1024, 256]
        """Bytes that plans need besides, in turn."""
        self.compiled: set[bytes] = set()
        """Kernels that were compiled by executions, and not taken from a runtime cache."""

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        return _Runtime(self, HostDevice.in_use[-1])


class Strategies:
    """An enumeration of TensorRT: members by name."""

    def __init__(self, *names: str) -> None:
        for name in names:
            setattr(self, name, name)


class RuntimeCache:
    """Names of kernels; a blob of another GPU is rejected."""

    HEAD = b"sm120 1.0.fake\n"

    def __init__(self) -> None:
        self.kernels: set[bytes] = set()

    def serialize(self) -> bytes:
        return self.HEAD + b"\n".join(sorted(self.kernels))

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(self.HEAD):
            return False
        self.kernels = set(blob.removeprefix(self.HEAD).splitlines())
        return True


class _Config:
    """As a runtime config begins: TensorRT-RTX allocates, specializes lazily, and captures nothing."""

    def __init__(self) -> None:
        self.allocation, self.dynamic_shapes_kernel_specialization_strategy = "STATIC", "LAZY"
        self.cuda_graph_strategy = "DISABLED"
        self.cache: RuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.allocation = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


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
        self.device_memory_size_v2 = trt.scratch[len(model.graph.node) % len(trt.scratch)]

    def create_runtime_config(self) -> Any:
        return _Config()

    def create_execution_context(self, config: Any) -> Any:
        return _Context(self._trt, self._device, self.model, config, self.device_memory_size_v2)


@dataclass(frozen=True)
class Bound:
    """The addresses and shapes of one execution."""

    addresses: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]


class _Context:
    def __init__(self, trt: FakeTrt, device: HostDevice, model: Any, config: _Config, scratch: int) -> None:
        blob = model.SerializeToString()
        wide = all(value.type.tensor_type.elem_type in WIDE for value in model.graph.input)
        self._session: Any = inference_session(blob) if wide else ReferenceEvaluator(model)
        self._config, self._kernel, self._needs = config, hashlib.sha256(blob).hexdigest().encode(), scratch
        self._scratch: tuple[int, int] | None = None
        self._trt, self._device, self._graph = trt, device, model.graph
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._ran: list[Bound] = []

    def set_device_memory(self, address: int, size: int) -> None:
        assert self._config.allocation == "USER_MANAGED"
        assert address % 256 == 0 and size >= self._needs and self._device.holds(address, size)
        self._scratch = (address, size)

    def is_stream_capturable(self, stream: int) -> bool:
        assert stream == self._device.stream
        return self._trt.capturable

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
            assert self._trt.capturable, "not capturable"
            assert self._config.dynamic_shapes_kernel_specialization_strategy != "LAZY", "a later kernel breaks graphs"
            assert self._config.cuda_graph_strategy == "DISABLED", "two captures of one call"
            assert bound in self._ran, "captured before it ran: a first execution may allocate"
            self._device.recording.append((self, bound))
            return True
        self._ran.append(bound)
        if self._config.cache is not None and self._kernel not in self._config.cache.kernels:
            self._config.cache.kernels.add(self._kernel)
            self._trt.compiled.add(self._kernel)
        self._execute(bound)
        return True

    def replay(self, bound: Bound) -> None:
        assert HostDevice.in_use[-1] is self._device
        assert bound.addresses == self._addresses, "the graph was captured with other addresses"
        assert bound.shapes == self._shapes, "the graph was captured with other shapes"
        self._execute(bound)

    def _execute(self, bound: Bound) -> None:
        assert self._scratch is not None, "no memory was given"
        address, size = self._scratch
        (ctypes.c_byte * size).from_address(address)[:] = [
            self._device.replayed % 127
        ] * size  # what others left is lost
        feeds = {value.name: self._array(value, bound).copy() for value in self._graph.input}
        for value, result in zip(self._graph.output, self._session.run(None, feeds), strict=True):
            self._array(value, bound)[...] = result

    def _array(self, value: Any, bound: Bound) -> Array:
        """Return the memory of an input or output; FP4 codes, which share bytes, copied to one a byte."""
        tensor = value.type.tensor_type
        shape = bound.shapes.get(value.name) or tuple(d.dim_value for d in tensor.shape.dim)
        if tensor.elem_type == onnx.TensorProto.FLOAT4E2M1:
            pairs = self._memory(value.name, bound, prod(shape) // 2)
            codes: Array = np.stack((pairs & 15, pairs >> 4), axis=-1).view(ml_dtypes.float4_e2m1fn).reshape(shape)
            return codes
        dtype = np.dtype(TYPES[tensor.elem_type])
        array: Array = self._memory(value.name, bound, prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
        return array

    def _memory(self, name: str, bound: Bound, size: int) -> Array:
        address = bound.addresses[name]
        assert self._device.holds(address, size), name
        memory: Array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        return memory
