"""GPU targets: which streaming multiprocessor (SM) versions a plan can be built for, and what each computes with.

Standard library only: `n3c check --sm` asks here without loading TensorRT. TensorRT-RTX builds for the
GPUs of `tensorrt_rtx.ComputeCapability`, for several in one plan, and needs none of them; its builder
refuses a type that one of them lacks ("HW-specific datatypes"). TensorRT builds for the GPU at hand.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from n3c.backends.gpus import GPUS, Gpu
from n3c.backends.machine import compute_capabilities
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Severity, Span
from n3c.ir.types import DType

Flavour = Literal["rtx", "full"]


@dataclass(frozen=True, slots=True)
class Target:
    """One SM version, and which narrow types its kernels know."""

    sm: int
    title: str
    bf16: bool = True
    fp8: bool = True
    fp4: bool = True
    flavours: tuple[Flavour, ...] = ("rtx", "full")
    published: bool = True
    """Whether NVIDIA's support matrix of TensorRT-RTX lists it, where its builder takes it."""

    @property
    def lacks(self) -> frozenset[DType]:
        """The types that its kernels do not know."""
        known = {DType.BF16: self.bf16, DType.F8E4M3: self.fp8, DType.F4E2M1: self.fp4}
        return frozenset(dtype for dtype, there in known.items() if not there)


TARGETS: dict[int, Target] = {
    target.sm: target
    for target in (
        Target(75, "Turing, RTX 20", bf16=False, fp8=False, fp4=False),
        Target(80, "Ampere, A100", fp8=False, fp4=False, published=False),
        Target(86, "Ampere, RTX 30", fp8=False, fp4=False),
        Target(89, "Ada, RTX 40", fp4=False),
        Target(90, "Hopper, H100 and H200", fp4=False, flavours=("full",)),
        Target(100, "Blackwell, B200", flavours=("full",)),
        Target(120, "Blackwell, RTX 50 and RTX PRO"),
        Target(121, "Blackwell, GB10"),
    )
}
"""SM version → target."""

PORTABLE = (80, 86, 89, 120, 121)
"""The versions of `--sm portable`: all that TensorRT-RTX builds for and n3c's plans have the types for.

NVIDIA's support matrix lists them but for 80. A GPU of another version, as an H100 (90), refuses such a plan.
"""


def sm_versions(given: int | str | Sequence[int]) -> tuple[int, ...]:
    """Return the SM versions of `120`, `sm_89`, `8.9`, `80,86`, `native`, `portable` or several numbers, each once.

    N3CError: E0701 (exit code 2) for a text that is none of these, E0518 (exit code 4) for `native` without a GPU;
    whether they are targets `require` says.
    """
    if given == "portable":
        return PORTABLE
    if isinstance(given, int):
        return (given,)
    parts = given.split(",") if isinstance(given, str) else [str(sm) for sm in given]
    versions = [_sm_versions(part.strip()) for part in parts]
    if not versions or not all(versions):
        message = f"--sm: {given!r} is no SM version (120, sm_120, 12.0), list of them, `native` or `portable`"
        raise N3CError(Diagnostic("E0701", message), ExitCode.USAGE)
    return tuple(dict.fromkeys(itertools.chain.from_iterable(versions)))


_SM = re.compile(r"(?:sm_?)?(\d{1,5})|(\d{1,2})\.(\d)", re.ASCII)


def _sm_versions(part: str) -> tuple[int, ...]:
    """Return the versions of one entry of a list; none where it is no entry."""
    if part == "native":
        return _native()
    found = _SM.fullmatch(part)
    return (int(found[1] or found[2] + found[3]),) if found else ()


def _native() -> tuple[int, ...]:
    versions = tuple(dict.fromkeys(compute_capabilities()))
    if not versions:
        help_ = "name the SM version that the plans are for, as `--sm 120`"
        raise N3CError(Diagnostic("E0518", "--sm native: there is no NVIDIA GPU here", help=help_), ExitCode.TARGET)
    return versions


def lacking(sms: Sequence[int]) -> frozenset[DType]:
    """Return the types that at least one of `sms` lacks: a plan for all does without.

    An SM version that is not known, which `require` refuses, lacks none.
    """
    return frozenset[DType]().union(*(TARGETS[sm].lacks for sm in sms if sm in TARGETS))


def require(sms: Sequence[int], flavour: Flavour = "rtx", span: Span | None = None) -> list[Diagnostic]:
    """Return what is wrong with building for `sms`: nothing, or an E0502 or E0503 for each.

    E0502: no such target, or not with this TensorRT. E0503: it has no BF16, in which every model stores
    its norms. FP4 and FP8 are never in the way: where a GPU lacks them, tables decode the codes.
    """
    faults: list[Diagnostic] = []
    for sm in dict.fromkeys(sms):
        target = TARGETS.get(sm)
        if target is None or flavour not in target.flavours:
            known = ", ".join(f"{t.sm} ({t.title})" for t in TARGETS.values() if flavour in t.flavours)
            title = {"rtx": "TensorRT-RTX", "full": "TensorRT"}[flavour]
            what = f"no target SM {sm}" if target is None else f"{title} has no target SM {sm} ({target.title})"
            faults.append(Diagnostic("E0502", what, span, help=f"known: {known}"))
        elif DType.BF16 in target.lacks:
            message = f"SM {sm} ({target.title}) has no BF16 type, in which norms and other weights are stored"
            able = ", ".join(str(t.sm) for t in TARGETS.values() if t.bf16 and flavour in t.flavours)
            faults.append(Diagnostic("E0503", message, span, help=f"build for SM {able}"))
    return faults


def unpublished(sms: Sequence[int], flavour: Flavour = "rtx") -> list[Diagnostic]:
    """Return a note (W0520) for each of `sms` that the builder takes and NVIDIA's support matrix does not list."""
    return [
        Diagnostic(
            "W0520",
            f"SM {sm} ({TARGETS[sm].title}) is outside NVIDIA's support matrix of TensorRT-RTX: "
            "the builder takes it, and nothing says that a plan runs there",
            severity=Severity.NOTE,
        )
        for sm in dict.fromkeys(sms)
        if flavour == "rtx" and sm in TARGETS and not TARGETS[sm].published
    ]


def serving(gpu: Gpu) -> tuple[Flavour, ...]:
    """Return which TensorRT serves a GPU, as NVIDIA publishes it."""
    target = TARGETS[gpu.sm]
    return tuple(flavour for flavour in target.flavours if flavour == "full" or target.published)


def served_gpus(sms: Sequence[int] = (), flavour: Flavour | None = None) -> tuple[Gpu, ...]:
    """Return the known GPUs of these SM versions (none: of any) that this TensorRT (None: whatever) serves."""
    return tuple(
        gpu for gpu in GPUS.values() if (not sms or gpu.sm in sms) and (flavour is None or flavour in serving(gpu))
    )


def named(sms: Sequence[int]) -> str:
    """Return `sms` as the command line writes them: `80,86`."""
    return ",".join(map(str, sms))
