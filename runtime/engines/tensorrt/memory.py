"""The memory of one GPU: weights and states of the plans that run on it, inputs and outputs of their calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from n3c.backends.onnx.bindings import Binding
from n3c.ir.types import DType
from n3c.passes.state_layout import ALIGNMENT, PlannedState

from .device import Device, Memory


@dataclass(slots=True)
class StateBuffers:
    """Where a state of all sequences lies, [B, …], and where a call writes it; caches have one place for both."""

    bytes: int
    """Of one sequence."""
    shape: tuple[int, ...]
    """Likewise."""
    now: tuple[Memory, int]
    after: tuple[Memory, int]

    def move_on(self, device: Device, row: int | None) -> None:
        """Make the result of a call the state: of all sequences, or of one."""
        if self.now == self.after:
            return
        if row is None:
            self.now, self.after = self.after, self.now
        else:  # the other rows are where they were, so this one comes back to them
            (memory, at), (spare, there) = self.now, self.after
            device.copy(memory, at + row * self.bytes, spare, there + row * self.bytes, self.bytes)

    def parts(self, row: int, places: range) -> Iterator[tuple[Memory, int, int]]:
        """Yield memory, offset and size of each piece of a sequence's state; of a cache [Y, C, Z] some places."""
        memory, offset = self.now
        offset += row * self.bytes
        if self.now != self.after:
            yield memory, offset, self.bytes
            return
        heads, capacity, _ = self.shape
        head = self.bytes // heads
        for index in range(heads if places else 0):
            start = offset + index * head + head // capacity * places.start
            yield memory, start, head // capacity * len(places)


class DeviceMemory:
    """The memory of one GPU, for `batch` sequences."""

    def __init__(self, device: Device, weights: Iterable[Binding], states: Sequence[PlannedState], batch: int) -> None:
        """Allocate `states` in one piece, as planned, a second place for those that are no caches, and `weights`.

        N3CError (E0815, exit code 4) where the device has no room.
        """
        self.device = device
        at, end = _offsets(states, batch)
        self.arena = device.allocate(end)
        spare_at, end = _offsets([state for state in states if state.kind != "kv"], batch)
        self.spare = device.allocate(end)
        self.states = {
            s.name: StateBuffers(
                s.bytes,
                s.shape,
                (self.arena, at[s.name]),
                (self.spare, spare_at[s.name]) if s.name in spare_at else (self.arena, at[s.name]),
            )
            for s in states
        }
        self.weights = {memory_of(binding): device.allocate(bytes_of(binding, binding.shape)) for binding in weights}
        self._buffers: dict[tuple[str, int], Memory] = {}

    def reset(self, sequences: Sequence[int] | None) -> None:
        """Zero the states of `sequences`, or all, in both of their places."""
        if sequences is None:
            for memory in (self.arena, self.spare):
                self.device.zero(memory, 0, memory.bytes)
            return
        for state in self.states.values():
            for memory, offset in {state.now, state.after}:
                for row in sequences:
                    self.device.zero(memory, offset + row * state.bytes, state.bytes)

    def snapshot(self, row: int, places: range) -> Memory:
        """Return a copy of the states of a sequence in one piece; of its caches, some places."""
        copied = self.device.allocate(sum(size for _, _, size in self._parts(row, places)))
        at = 0
        for memory, offset, size in self._parts(row, places):
            self.device.copy(copied, at, memory, offset, size)
            at += size
        return copied

    def restore(self, row: int, places: range, copied: Memory) -> None:
        """Copy back."""
        at = 0
        for memory, offset, size in self._parts(row, places):
            self.device.copy(memory, offset, copied, at, size)
            at += size

    def _parts(self, row: int, places: range) -> Iterator[tuple[Memory, int, int]]:
        return (part for state in self.states.values() for part in state.parts(row, places))

    def state_address(self, name: str, row: int | None, *, after: bool) -> int:
        """Return where a call reads a state, or writes it; `row` is the sequence where the plan is for one."""
        state = self.states[name]
        memory, offset = state.after if after else state.now
        return memory.address + offset + (row or 0) * state.bytes

    def buffer(self, binding: Binding, shape: Sequence[int]) -> Memory:
        """Return the buffer of an input or output; one for each size, so that addresses stay."""
        size = max(1, bytes_of(binding, shape))
        key = (binding.name, size)
        if key not in self._buffers:
            self._buffers[key] = self.device.allocate(size)
        return self._buffers[key]


def memory_of(binding: Binding) -> str:
    """Return what names the bytes of a weight: plans bind the same ones as different types."""
    return binding.memory or binding.name


def bytes_of(binding: Binding, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor of the binding's dtype."""
    return prod(shape) * DType(binding.dtype).bits // 8


def _offsets(states: Iterable[PlannedState], batch: int) -> tuple[dict[str, int], int]:
    """Return where each state of `batch` sequences begins when they lie one after the other, and the end."""
    offsets: dict[str, int] = {}
    end = 0
    for state in states:
        offsets[state.name] = end
        end += batch * -(-state.bytes // ALIGNMENT) * ALIGNMENT
    return offsets, end
