"""The model of a generated package with packed linears and experts, and the tensors that its weights are read into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from n3c.backends.progress import SILENT, Progress
from n3c.ir.formats import FORMATS
from n3c.ir.program import Parameter
from n3c.ir.types import DType
from n3c.passes.lower.model import lower
from n3c.passes.pipelines import quantize_pass
from n3c.specs.schema import Spec

from .modules import PackedExperts, PackedLinear
from .operations import Operations
from .packed import PackedWeight
from .weights import WeightSource

BYTES = (DType.F4E2M1, DType.F8E4M3)
"""Types that are held as bytes."""
FLOATS = {DType.F32: torch.float32, DType.F16: torch.float16, DType.BF16: torch.bfloat16}


def stored_parameters(spec: Spec) -> dict[str, Parameter]:
    """Return the parameters of a spec in their deployed formats, one for each tensor, as the checkpoint names them."""
    program = lower(spec)
    quantize_pass(spec).run(program)
    return dict(program.parameters)


class PackedModel:
    """A generated model on a device, made without memory and then given that of its stored weights."""

    def __init__(self, package: Any, parameters: Mapping[str, Parameter], operations: Operations, device: Any) -> None:
        """Allocate every weight of `parameters`, which are `stored_parameters`; `fill` gives them values."""
        self._parameters, self._operations, self._device = parameters, operations, device
        self._tensors: dict[str, Tensor] = {}
        """Name of a parameter → what holds it."""
        self._routers: dict[str, Any] = {}
        """Name of its weight → a router."""
        with torch.device("meta"):
            self.module = package.Model().eval()
        for name, module in list(self.module.named_modules()):
            self._pack(name, module)
        for name, module in list(self.module.named_modules()):
            self._hold(name, module)
        table = self.module.backbone.embeddings.weight
        tied = PackedWeight("bf16", table, None, None, tuple(table.shape))
        self.head = self.module.lm_head if hasattr(self.module, "lm_head") else PackedLinear(tied, operations)
        """Gives logits; with tied embeddings it reads their table."""

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        routers = sum(router.weight.nbytes for router in self._routers.values())
        return routers + sum(tensor.nbytes for tensor in self._tensors.values())

    def fill(self, source: WeightSource, progress: Progress = SILENT) -> None:
        """Read every weight into its place; N3CError (exit code 6) where the source has it not."""
        done, total = 0, len(self._tensors) + len(self._routers)
        for name, tensor in self._tensors.items():
            source.fill(self._parameters[name], tensor)
            done += 1
            progress.step(name, done, total)
        for name, router in self._routers.items():
            parts = self._allocate(name)
            for part, tensor in parts.items():
                source.fill(self._parameters[part], tensor)
            router.weight.copy_(self._packed(name, parts).dequantized(torch.float32))
            done += 1
            progress.step(name, done, total)

    def _pack(self, name: str, module: Any) -> None:
        """Put a packed module in the place of a linear, or of experts, which have two weights."""
        parent, _, own = name.rpartition(".")
        if isinstance(module, nn.Linear):
            packed: nn.Module = PackedLinear(self._weight(f"{name}.weight"), self._operations)
        elif type(module).__name__ == "Experts":
            up, down = (self._weight(f"{name}.*.{side}_proj.weight") for side in ("up", "down"))
            packed = PackedExperts(up, down, self._operations)
        else:
            return
        setattr(self.module.get_submodule(parent), own, packed)

    def _hold(self, name: str, module: Any) -> None:
        """Give memory to the other tensors of a module, in their stored types; routers compute in float32."""
        for own, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            full = f"{name}.{own}"
            if own == "weight" and type(module).__name__ == "Router":
                held = torch.empty(tensor.shape, dtype=torch.float32, device=self._device)
                self._routers[full] = module
            else:
                (held,) = self._allocate(full.replace(".A_log", ".A")).values()
                self._tensors[full.replace(".A_log", ".A")] = held
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(module, own, nn.Parameter(held, requires_grad=False) if is_parameter else held)

    def _weight(self, name: str) -> PackedWeight:
        """Return a weight with memory of its own."""
        parts = self._allocate(name)
        self._tensors |= parts
        return self._packed(name, parts)

    def _allocate(self, name: str) -> dict[str, Tensor]:
        """Return tensors for the parts of a weight, by the names of their parameters."""
        names = FORMATS[self._parameters[name].format].part_names(name).values()
        return {part: self._empty(self._parameters[part]) for part in names}

    def _empty(self, parameter: Parameter) -> Tensor:
        dtype, shape = parameter.type.dtype, parameter.type.static_dims
        if dtype is DType.F4E2M1:
            shape = (*shape[:-1], shape[-1] // 2)
        return torch.empty(shape, dtype=torch.uint8 if dtype in BYTES else FLOATS[dtype], device=self._device)

    def _packed(self, name: str, parts: Mapping[str, Tensor]) -> PackedWeight:
        parameter = self._parameters[name]
        format_ = FORMATS[parameter.format]
        held = {part: parts[stored] for part, stored in format_.part_names(name).items()}
        shape = parameter.type.static_dims
        if not format_.quantized:
            return PackedWeight("bf16", held["codes"], None, None, shape)
        if not format_.blocked:
            return PackedWeight("fp8", held["codes"], None, held["scale"], shape)
        return PackedWeight("nvfp4", held["codes"], held["scale"], held["scale_2"], shape)
