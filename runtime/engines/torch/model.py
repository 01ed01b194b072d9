"""The model of a generated package with packed linears and experts, and the tensors that its weights are read into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from n3c.backends.progress import SILENT, Progress
from n3c.ir.formats import FORMATS, INPUT_SCALE
from n3c.ir.program import Parameter
from n3c.ir.types import DType
from n3c.passes.base import run_pipeline
from n3c.passes.lower.model import lower
from n3c.passes.pipelines import quantize_activations_pass, quantize_pass
from n3c.specs.schema import Spec

from .activations import Activation
from .modules import Beside, Gate, PackedExperts, PackedLinear, PackedMlp
from .operations import Operations
from .packed import PackedWeight
from .weights import WeightSource

BYTES = (DType.F4E2M1, DType.F8E4M3)
"""Types that are held as bytes."""
FLOATS = {DType.F32: torch.float32, DType.F16: torch.float16, DType.BF16: torch.bfloat16}


def stored_parameters(spec: Spec) -> dict[str, Parameter]:
    """Return the parameters of a spec in their deployed formats, one for each tensor, as the checkpoint names them."""
    program = lower(spec)
    run_pipeline(program, [quantize_pass(spec), quantize_activations_pass(spec)])
    return dict(program.parameters)


class _NothingDrawn(TorchFunctionMode):
    """Leaves out what fills the weights of a fresh module. On tensors without memory it would load the compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _without_memory(package: Any) -> Any:
    """Return a model of a generated package on the meta device."""

    class Unfilled(package.Model):  # type: ignore[misc]
        def init_weights(self) -> None:
            """Draw nothing."""

    with torch.device("meta"), _NothingDrawn():
        return Unfilled().eval()


class PackedModel:
    """A generated model on a device, made without memory and then given that of its stored weights."""

    def __init__(self, package: Any, parameters: Mapping[str, Parameter], operations: Operations, device: Any) -> None:
        """Allocate every weight of `parameters`, which are `stored_parameters`; `fill` gives them values."""
        self._parameters, self._operations, self._device = parameters, operations, device
        self._tensors: dict[str, Tensor] = {}
        """Name of a parameter → what holds it."""
        self._routers: dict[str, Any] = {}
        """Name of its weight → a router whose weight is quantized: it is held dequantized, in float32."""
        self.module = _without_memory(package)
        self._pack("", self.module)
        table = self.module.backbone.embeddings.weight
        tied = PackedWeight("bf16", table, None, None, tuple(table.shape))
        untied = getattr(self.module, "lm_head", None)
        self.head = untied or PackedLinear(tied, operations, torch.float32)
        """Gives logits in float32; with tied embeddings it reads their table."""

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        routers: list[Tensor] = [router.weight for router in self._routers.values()]
        return sum(tensor.nbytes for tensor in (*routers, *self._tensors.values()))

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

    def _pack(self, parent: str, module: nn.Module) -> None:
        """Put a packed module in the place of each part of `module` that has one, and give memory to what stays."""
        self._hold(parent, module)
        for own, part in list(module.named_children()):
            name = f"{parent}.{own}" if parent else own
            packed = self._packed_module(name, part)
            if packed is None:
                self._pack(name, part)
            else:
                setattr(module, own, packed)
        shared = getattr(module, "shared_experts", None)
        if shared is not None:
            module.shared_experts = Beside(module, shared, self._operations)

    def _packed_module(self, name: str, module: nn.Module) -> nn.Module | None:
        """Return what takes the place of a module of the generated package; None where it stays."""
        made = self._operations
        if isinstance(module, nn.Linear):
            dtype = torch.float32 if name == "lm_head" else None
            return PackedLinear(self._weight(f"{name}.weight"), made, dtype, self._activation(name))
        match type(module).__name__:
            case "MLP":
                up, down = (self._weight(f"{name}.{side}_proj.weight") for side in ("up", "down"))
                return PackedMlp(up, down, made, self._both_activations(name))
            case "Experts":
                up, down = (self._weight(f"{name}.*.{side}_proj.weight") for side in ("up", "down"))
                return PackedExperts(up, down, made, self._both_activations(f"{name}.*"))
            case "Router":
                self._hold_router(name, module)
                return Gate(module, made, self._activation(name))
            case _:
                return None

    def _hold_router(self, name: str, router: Any) -> None:
        """Give memory to a router: it has a module of its own that no packed one replaces, so no quantized weight."""
        weight = self._parameters[f"{name}.weight"]
        if FORMATS[weight.format].quantized:
            self._routers[weight.name] = router
            held = torch.empty(weight.type.static_dims, dtype=torch.float32, device=self._device)
            router.weight = nn.Parameter(held, requires_grad=False)
        self._hold(name, router)

    def _hold(self, name: str, module: nn.Module) -> None:
        """Give memory to a module's own tensors, in their stored types."""
        for own, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            full = f"{name}.{own}".replace(".A_log", ".A")
            if full in self._routers:
                continue
            (held,) = self._allocate(full).values()
            self._tensors[full] = held
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(module, own, nn.Parameter(held, requires_grad=False) if is_parameter else held)

    def _weight(self, name: str) -> PackedWeight:
        """Return a weight with memory of its own."""
        parts = self._allocate(name)
        self._tensors |= parts
        return self._packed(name, parts)

    def _both_activations(self, name: str) -> tuple[Activation | None, Activation | None]:
        return self._activation(f"{name}.up_proj"), self._activation(f"{name}.down_proj")

    def _activation(self, name: str) -> Activation | None:
        """Return what the linear of a module reads rounded, with memory for its scale; None where that is not."""
        scale = self._parameters.get(name + INPUT_SCALE)
        if scale is None:
            return None
        self._tensors[scale.name] = self._empty(scale)
        return Activation(self._parameters[f"{name}.weight"].format, self._tensors[scale.name])

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
