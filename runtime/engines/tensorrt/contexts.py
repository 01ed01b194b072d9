"""Execution contexts as NVIDIA's documents ask for where their calls become CUDA graphs.

n3c captures graphs itself, so TensorRT-RTX must neither capture any nor compile kernels for single shapes later: a
kernel that comes later invalidates a graph, and one compiled for each new length stalls a decoding. Kernels of dynamic
shape, which are those of attention, are general ones. Contexts of one GPU run one after the other on one stream and
share one piece of scratch. Kernels that TensorRT-RTX compiles when a plan first runs are kept beside the plans.

https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/ (IRuntimeConfig, IRuntimeCache, IExecutionContext)
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from n3c.backends.trt.module import flavour_of
from n3c.backends.trt.plan_file import RUNTIME_CACHE_SUFFIX
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span

from .device import Device


class Contexts:
    """The execution contexts of the plans that run on one GPU."""

    def __init__(self, trt: Any, logger: Any, device: Device, paths: Sequence[Path]) -> None:
        """Load the plans at `paths`; N3CError (E0812, E0815, exit code 4) where one is refused or memory lacks."""
        self._trt, self._device = trt, device
        self._runtime: Any = trt.Runtime(logger)  # engines need it to live as long as they do
        self._cache: Any = None
        self._cache_path = paths[0].with_name(f"sm{device.sm}{RUNTIME_CACHE_SUFFIX}") if paths else None
        self._saved = b""
        engines = [self._engine(path) for path in paths]
        self.contexts = [self._context(engine, path) for engine, path in zip(engines, paths, strict=True)]
        size = max((int(engine.device_memory_size_v2) for engine in engines), default=0)
        self._scratch = device.allocate(size) if size else None
        if self._scratch is not None:
            for context in self.contexts:
                context.set_device_memory(self._scratch.address, size)

    def save(self) -> None:
        """Keep the kernels that were compiled, for the next start; nothing where the folder cannot be written."""
        if self._cache is None or self._cache_path is None:
            return
        data = bytes(self._cache.serialize())
        if data == self._saved:
            return
        partial = self._cache_path.with_name(f"{self._cache_path.name}.partial")
        with contextlib.suppress(OSError):
            partial.write_bytes(data)
            partial.replace(self._cache_path)
            self._saved = data

    def _engine(self, path: Path) -> Any:
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise refused(path, "is refused by the runtime: built for another TensorRT version or GPU, or damaged")
        return engine

    def _context(self, engine: Any, path: Path) -> Any:
        trt, config = self._trt, engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if flavour_of(trt) == "rtx":
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.NONE
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
            config.set_runtime_cache(self._kept_kernels(config))
        context = engine.create_execution_context(config)
        if context is None:
            raise refused(path, "has no room on the device, or is refused by the runtime")
        return context

    def _kept_kernels(self, config: Any) -> Any:
        """Return the cache of all plans, with what an earlier process left; TensorRT-RTX rejects another machine's."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with contextlib.suppress(OSError):
                assert self._cache_path is not None
                data = self._cache_path.read_bytes()
                if self._cache.deserialize(data):
                    self._saved = data
        return self._cache


def refused(path: Path, what: str) -> N3CError:
    """Return the error of a plan that does not run."""
    help_ = "build the plan again on this machine; TensorRT has said more on stderr"
    return N3CError(Diagnostic("E0812", f"the plan {what}", Span(str(path)), help=help_), ExitCode.TARGET)
