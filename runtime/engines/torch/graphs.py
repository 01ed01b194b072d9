"""CUDA graphs of calls that come again: the same kernels on the same addresses, launched at once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

Outputs = dict[str, Tensor]
Work = Callable[[], Outputs]
Call = tuple[str, int]
"""An entry point, and how many sequences a call of it has: what work is known by."""


class Recorder(Protocol):
    """Records work on a stream, of which every call of an engine is in the order."""

    def current(self) -> AbstractContextManager[Any]:
        """Return a context in which work goes to the stream."""
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return what launches the kernels of `work` again, reading and writing where they did.

        `work` has run before, and is not executed now. RuntimeError where it waits for the device.
        """
        ...


class CudaRecorder:
    """Records CUDA graphs. Their intermediate results share one pool of memory, as one runs after the other."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def current(self) -> AbstractContextManager[Any]:
        """Make the side stream, which recording demands, that of all work: so it never waits for another one."""
        return torch.cuda.stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture a graph."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            work()
        return graph.replay


class Graphs:
    """Runs work by its key: first as it is, which compiles and allocates, then recorded, and from then on replayed.

    The states of an engine move on in each run, so there is none that only warms up.
    """

    def __init__(self, recorder: Recorder | None) -> None:
        """Take None where nothing is to be recorded."""
        self._recorder = recorder
        self._seen: set[Call] = set()
        self._replays: dict[Call, tuple[Callable[[], None], Outputs]] = {}
        self.refused: dict[Call, str] = {}
        """Key of work that cannot be recorded, and runs as it is → the reason."""

    def records(self, key: Call) -> bool:
        """Whether work of this key is recorded, now or later: it must read nothing on the host."""
        return self._recorder is not None and key not in self.refused

    def replay(self, key: Call) -> Callable[[], None] | None:
        """Return what launches the recorded work of a key once more; None where none is recorded."""
        recorded = self._replays.get(key)
        return None if recorded is None else recorded[0]

    def current(self) -> AbstractContextManager[Any]:
        """Return a context in which inputs are written and work runs."""
        return nullcontext() if self._recorder is None else self._recorder.current()

    def run(self, key: Call, work: Work) -> Outputs:
        """Return the outputs of `work`; those of recorded work are the same tensors each time."""
        if self._recorder is None or key in self.refused or key not in self._seen:
            self._seen.add(key)
            return work()
        if key not in self._replays:
            outputs: Outputs = {}
            try:
                replay = self._recorder.record(lambda: outputs.update(work()))
            except RuntimeError as error:
                self.refused[key] = str(error).partition("\n")[0]
                return work()
            self._replays[key] = replay, outputs
        replay, outputs = self._replays[key]
        replay()
        return outputs
