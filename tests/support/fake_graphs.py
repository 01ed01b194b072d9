"""CUDA graphs played on a CPU: the calls of PyTorch that a recording saw run again, on the very tensors that it saw.

So numbers that the host read while it recorded are frozen, inputs that are not static are never read again, and what
a call writes lies where it lay. As on a GPU, recording executes nothing, and what waits for the device is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique", "aten.equal")
"""Calls that need a number of the device on the host."""


class FakeRecorder:
    """Records as `CudaRecorder` does. `recorded` and `replayed` count."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def current(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        tape = _Tape()
        try:
            with patch.object(Tensor, "tolist", _refuse), patch.object(Tensor, "numpy", _refuse), tape:
                work()
        finally:
            tape.undo()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            with torch.no_grad():
                tape.replay()

        return replay


def _refuse(*_: Any) -> None:
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if str(func).startswith(WAITS):
            _refuse()
        if func._schema.is_mutable:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor):
                    base = value if value._base is None else value._base
                    self._before.setdefault(id(base), (base, base.clone()))
        result = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, result))
        return result

    def undo(self) -> None:
        """Give the tensors that were written what they held."""
        with torch.no_grad():
            for tensor, value in self._before.values():
                tensor.copy_(value)

    def replay(self) -> None:
        for func, args, kwargs, result in self._calls:
            if _is_view(func):
                continue
            again = func(*args, **kwargs)
            for held, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(held, Tensor) and held is not new:
                    held.copy_(new)


def _is_view(func: Any) -> bool:
    """Whether a result of `func` is the memory of an argument, unwritten."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
