"""Triton's interpreter as strict as a GPU is not: kernels stay in their tensors' memory, and use what they load."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
from torch import Tensor


@pytest.fixture
def kernel_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a lane that its mask lets through reads or writes what is of none of the kernel's tensors.

    Where a load has no `other`, the lanes that its mask keeps out are NaN, or 1, which may be a document's number.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    run, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
    starts, ends = np.zeros(0, np.uint64), np.zeros(0, np.uint64)

    def watched(kernel: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal starts, ends
        tensors = [value for value in (*arguments, *options.values()) if isinstance(value, Tensor) and value.numel()]
        extents = np.array(sorted(extent(tensor) for tensor in tensors), np.uint64)
        starts, ends = extents[:, 0], np.maximum.accumulate(extents[:, 1])
        return run(kernel, *arguments, **options)

    def check(pointers: Any, mask: Any) -> None:
        places = np.broadcast_to(pointers.data, mask.data.shape)[mask.data]
        before = np.searchsorted(starts, places, side="right") - 1
        outside = (before < 0) | (places >= ends[before])
        assert not outside.any(), f"{outside.sum()} of {places.size} places are of no tensor"

    def checked_load(builder: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        check(pointers, mask)
        loaded = load(builder, pointers, mask, other, *rest)
        if other is None:
            unset = np.array(-1 if pointers.get_element_ty().is_floating() else 1).astype(f"i{loaded.data.itemsize}")
            loaded.data = np.where(mask.data, loaded.data, unset.view(loaded.data.dtype))
        return loaded

    def checked_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(builder, pointers, value, mask, *rest)

    monkeypatch.setattr(executor, "__call__", watched)
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)


def extent(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte of a tensor, and of the first behind it."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
