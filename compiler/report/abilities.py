"""What a machine lets one do with n3c, and what it lacks for the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from n3c.backends.machine import Device
from n3c.backends.trt.targets import TARGETS
from n3c.ir.types import DType


@dataclass(frozen=True, slots=True)
class Ability:
    """Something that n3c does, and why it does not on this machine."""

    what: str
    lacks: str = ""
    """What is missing; empty where nothing is."""

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c doctor --json`."""
        return asdict(self)


def abilities(packages: Mapping[str, str | None], gpus: Sequence[Device]) -> Iterator[Ability]:
    """Yield what can be done with these packages (name → version, None where it is not installed) on these GPUs."""

    def lacking(*needed: str) -> str:
        missing = [name for name in needed if packages[name] is None]
        return f"the package{'s' * (len(missing) > 1)} {', '.join(missing)}" if missing else ""

    torch = packages["torch"]
    cuda = lacking("torch") or ("" if gpus else "an NVIDIA GPU")
    if not cuda and torch is not None and "+cpu" in torch:
        cuda = f"a PyTorch with CUDA (torch {torch} is for CPUs)"
    builder = "" if packages["tensorrt-rtx"] or packages["tensorrt"] else "the package tensorrt-rtx"
    yield Ability("check, inspect, diff, import, export-config, quantize")
    yield Ability("build --target torch")
    yield Ability("build --target onnx", lacking("onnx", "onnx-ir"))
    yield Ability("build --target trt", builder)
    yield Ability("run, bench: on the CPU", lacking("onnxruntime"))
    yield Ability("verify", lacking("torch", "onnx", "onnxruntime"))
    yield Ability("quantize --auto, --calibration", lacking("torch"))
    yield Ability("train.py on the CPU: BF16, and NVFP4 emulated", lacking("torch"))
    bf16 = cuda or _lacking_type(gpus, DType.BF16, "a GPU of SM 80 or later, with BF16")
    fp4 = cuda or _lacking_type(gpus, DType.F4E2M1, "a GPU of SM 100 or later, with FP4")
    yield Ability("train.py on a GPU: BF16", bf16)
    yield Ability("train.py on a GPU: NVFP4", fp4 or lacking("transformer-engine"))
    yield Ability("run, bench: --device cuda --engine torch", bf16)
    for flavour, package in (("rtx", "tensorrt-rtx"), ("full", "tensorrt")):
        served = any(gpu.sm in TARGETS and flavour in TARGETS[gpu.sm].flavours for gpu in gpus)
        no_target = "" if served else f"a GPU that {package} serves"
        yield Ability(f"plans of --trt {flavour} on a GPU", cuda or lacking(package) or no_target)


def narrow_types(sm: int) -> str:
    """Return the types below 32 bits that the tensor cores of an SM version know, `BF16, FP8, FP4`."""
    target = TARGETS.get(sm)
    if target is None:
        return "not known to n3c"
    known = {"BF16": target.bf16, "FP8": target.fp8, "FP4": target.fp4}
    return ", ".join(name for name, has in known.items() if has) or "none"


def _lacking_type(gpus: Sequence[Device], dtype: DType, said: str) -> str:
    """Return the GPU that is missing where none has tensor cores for `dtype`; one that n3c does not know may have."""
    known = (TARGETS.get(gpu.sm) for gpu in gpus)
    return "" if any(target is None or dtype not in target.lacks for target in known) else said
