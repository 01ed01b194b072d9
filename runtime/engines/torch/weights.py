"""Where the weights of an engine come from: a checkpoint, streamed, or random numbers made on the device."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.sources import load
from n3c.ir.formats import FORMATS, INPUT_SCALE
from n3c.ir.program import Parameter
from n3c.ir.source import CacheScale, Fp8, InputScale, NegExp, Nvfp4, Source, Stack
from n3c.ir.source import Tensor as Named


class WeightSource(Protocol):
    """Fills tensors of an engine, on whatever device they lie."""

    def fill(self, parameter: Parameter, into: Tensor) -> None:
        """Write the value of `parameter` to `into`, a contiguous tensor of its stored type.

        Codes of FP8 and FP4 and scales of blocks are bytes. N3CError (exit code 6) where a checkpoint does not have it.
        """
        ...


class CheckpointWeights:
    """The tensors of a checkpoint; weights that it holds unquantized are quantized on the way."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def fill(self, parameter: Parameter, into: Tensor) -> None:
        """Read the tensor; of stacked experts one is in host memory at a time."""
        places = into.unbind(0) if _stack(parameter.source) is not None else (into,)
        for matrix, place in zip(_matrices(parameter), places, strict=True):
            raw = np.ascontiguousarray(load(matrix, self._checkpoint)).reshape(-1).view(np.uint8)
            place.reshape(-1).view(torch.uint8).copy_(torch.as_tensor(raw))


class RandomWeights:
    """Random weights in the stored formats, made on the device; each depends on its name and the seed only.

    Activations keep their size through any number of layers. `parameters` are those that will be asked for, by name.
    """

    def __init__(self, parameters: Mapping[str, Parameter], seed: int = 0) -> None:
        self._parameters, self._seed = parameters, seed

    def fill(self, parameter: Parameter, into: Tensor) -> None:
        """Draw the values. Codes of FP4 are uniform over all codes, FP8 weights normal, scales so that both fit."""
        generator = torch.Generator(into.device).manual_seed(self._seed ^ zlib.crc32(parameter.name.encode()))
        source = parameter.source
        if isinstance(source, Nvfp4) and source.part == "codes":
            into.random_(0, 256, generator=generator)
        elif isinstance(source, Nvfp4) and source.part == "scale":
            into.random_(_E4M3_HALF, _E4M3_TWO, generator=generator)
        elif isinstance(source, Nvfp4):
            into.fill_(self._deviation(parameter) / _NVFP4_DEVIATION)
        elif isinstance(source, Fp8) and source.part == "codes":
            rows = torch.empty(into.shape, dtype=torch.bfloat16, device=into.device).normal_(generator=generator)
            into.copy_(rows.to(torch.float8_e4m3fn).view(torch.uint8))
        elif isinstance(source, Fp8):
            into.fill_(self._deviation(parameter))
        elif isinstance(source, CacheScale):
            into.fill_(1)
        elif isinstance(source, InputScale):  # for inputs up to 8
            weight = self._parameters[parameter.name.removesuffix(INPUT_SCALE) + ".weight"]
            into.fill_(8 / (FORMATS[weight.format].input_divisor or 1.0))
        elif parameter.buffer:  # a bias of the choice of experts: with one, all tokens would choose the same
            into.zero_()
        elif parameter.role.endswith("norm") or parameter.name.endswith(".D"):
            into.uniform_(0.5, 1.5, generator=generator)
        elif isinstance(source, NegExp):  # the logarithm of a decay rate
            into.uniform_(0.0, 2.0, generator=generator)
        else:
            into.normal_(0.0, _deviation(parameter), generator=generator)

    def _deviation(self, scale: Parameter) -> float:
        """Return the standard deviation of the weight that `scale` belongs to."""
        name = scale.name.removesuffix("_2").removesuffix("_scale")
        return _deviation(self._parameters[name])


_E4M3_HALF, _E4M3_TWO = 0x30, 0x40
"""The bytes of 0.5 and 2."""
_NVFP4_DEVIATION = 2.915 * 1.154
"""Root mean square of the E2M1 values times that of the E4M3 values from 0.5 to 2 (eight of each power)."""


def _deviation(parameter: Parameter) -> float:
    dims = parameter.type.static_dims
    return 0.3 if len(dims) == 1 else float(0.6 / dims[-1] ** 0.5)


def _matrices(parameter: Parameter) -> Iterator[Parameter]:
    """Yield the parameter or, where it stacks experts, one for each of them."""
    stack = _stack(parameter.source)
    if stack is None:
        yield replace(parameter, source=_stored(parameter.source))
        return
    type_ = replace(parameter.type, dims=parameter.type.dims[1:])
    for index in range(stack.count):
        one = Named(stack.pattern.replace("*", str(index)))
        yield replace(parameter, type=type_, source=_in_format(parameter.source, one))


def _in_format(source: Source, operand: Source) -> Source:
    """Return the same part of `operand` as `source` is of another weight."""
    match source:
        case Nvfp4() | Fp8():
            return replace(source, operand=operand)
        case _:
            return operand


def _stack(source: Source) -> Stack | None:
    inner = source.operand if isinstance(source, (Nvfp4, Fp8)) else source
    return inner if isinstance(inner, Stack) else None


def _stored(source: Source) -> Source:
    """Return what the generated module holds: of a decay rate its logarithm, as the checkpoint does."""
    return source.operand if isinstance(source, NegExp) else source
