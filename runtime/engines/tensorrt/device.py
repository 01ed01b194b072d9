"""Memory and the stream of a GPU, through PyTorch, which brings the CUDA runtime along."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from n3c.runtime.engines.cuda import no_memory, require_cuda
from n3c.runtime.engines.interface import Array


class Memory(Protocol):
    """A piece of device memory; freed with the object."""

    @property
    def address(self) -> int:
        """Where it begins, on a multiple of 256 bytes."""
        ...

    @property
    def bytes(self) -> int:
        """Its size."""
        ...


class Device(Protocol):
    """The operations of a GPU that an engine needs. All work is in the order of one stream."""

    @property
    def stream(self) -> int:
        """The handle of the stream."""
        ...

    @property
    def sm(self) -> int:
        """Its architecture: 89, 120."""
        ...

    def current(self) -> AbstractContextManager[object]:
        """Return a context in which TensorRT works on this GPU."""
        ...

    def allocate(self, size: int) -> Memory:
        """Return `size` bytes of zeros; N3CError (E0815, exit code 4) where there is no room."""
        ...

    def write(self, memory: Memory, offset: int, data: Array) -> None:
        """Copy the bytes of `data` to `offset`."""
        ...

    def read(self, memory: Memory, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, when all work before is done."""
        ...

    def copy(self, memory: Memory, offset: int, source: Memory, source_offset: int, size: int) -> None:
        """Copy `size` bytes on the device."""
        ...

    def receive(self, memory: Memory, sender: Device, source: Memory) -> None:
        """Copy all of `source`, on the GPU `sender`, when the work there is done; work here waits for it."""
        ...

    def zero(self, memory: Memory, offset: int, size: int) -> None:
        """Fill `size` bytes from `offset` on with zeros."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return a CUDA graph of `work`, which has run before and only enqueues on the stream; calling it replays."""
        ...


def cuda_devices(most: int) -> list[Device]:
    """Return the first `most` GPUs, or as many as there are; N3CError (E0801, exit code 4) without any."""
    import torch

    require_cuda()
    return [TorchDevice(torch, index) for index in range(min(most, torch.cuda.device_count()))]


class _Tensor:
    """Device memory as a tensor of bytes."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.address: int = tensor.data_ptr()
        self.bytes: int = tensor.numel()


class TorchDevice:
    """A CUDA device of PyTorch, with a stream of its own."""

    def __init__(self, torch: Any, index: int) -> None:
        self._torch, self._index = torch, index
        self._stream: Any = torch.cuda.Stream(index)
        self.stream: int = self._stream.cuda_stream
        major, minor = torch.cuda.get_device_capability(index)
        self.sm: int = 10 * major + minor

    def current(self) -> AbstractContextManager[object]:
        device: AbstractContextManager[object] = self._torch.cuda.device(self._index)
        return device

    def allocate(self, size: int) -> Memory:
        try:
            tensor = self._torch.zeros(size, dtype=self._torch.uint8, device=f"cuda:{self._index}")
            self._torch.cuda.synchronize(self._index)
        except self._torch.cuda.OutOfMemoryError as error:
            help_ = "`n3c build --stages N` spreads over N GPUs"
            raise no_memory(self._index, f"{size:,} bytes", help_) from error
        return _Tensor(tensor)

    def write(self, memory: Memory, offset: int, data: Array) -> None:
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        with self._torch.cuda.stream(self._stream):
            self._slice(memory, offset, flat.size).copy_(self._torch.from_numpy(flat))

    def read(self, memory: Memory, offset: int, size: int) -> bytes:
        with self._torch.cuda.stream(self._stream):
            data: bytes = self._slice(memory, offset, size).cpu().numpy().tobytes()
        return data

    def copy(self, memory: Memory, offset: int, source: Memory, source_offset: int, size: int) -> None:
        with self._torch.cuda.stream(self._stream):
            self._slice(memory, offset, size).copy_(self._slice(source, source_offset, size))

    def receive(self, memory: Memory, sender: Device, source: Memory) -> None:
        assert isinstance(sender, TorchDevice)
        # Of two GPUs, PyTorch makes the current streams of both wait for a copy, and the copy for them.
        with self._torch.cuda.stream(sender._stream), self._torch.cuda.stream(self._stream):
            self._slice(memory, 0, memory.bytes).copy_(self._slice(source, 0, source.bytes), non_blocking=True)

    def zero(self, memory: Memory, offset: int, size: int) -> None:
        with self._torch.cuda.stream(self._stream):
            self._slice(memory, offset, size).zero_()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = self._torch.cuda.CUDAGraph()
        self._stream.synchronize()
        with self.current(), self._torch.cuda.graph(graph, stream=self._stream):
            work()

        def replay() -> None:
            with self._torch.cuda.stream(self._stream):
                graph.replay()

        return replay

    @staticmethod
    def _slice(memory: Memory, offset: int, size: int) -> Any:
        assert isinstance(memory, _Tensor)
        return memory.tensor[offset : offset + size]
