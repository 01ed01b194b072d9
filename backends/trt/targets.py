"""GPU targets: which streaming multiprocessor (SM) versions a plan can be built for, and what each can store.

Standard library only: `n3c check --sm` asks here without loading TensorRT. The table is that of
`tensorrt_rtx.ComputeCapability`; the formats are those that its builder accepts for each SM
(others fail there with "HW-specific datatypes").
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from n3c.ir.diagnostics import Diagnostic, Span

NVFP4_FORMATS = ("nvfp4", "w4a16_nvfp4")


@dataclass(frozen=True, slots=True)
class Target:
    """One SM version."""

    sm: int
    title: str
    fp8: bool
    fp4: bool

    def stores(self, format_: str) -> bool:
        """Whether weights of `format_` (as in specs: nvfp4, w4a16_nvfp4, fp8, bf16) can be read here."""
        if format_ in NVFP4_FORMATS:
            return self.fp4
        return self.fp8 or format_ != "fp8"


TARGETS: dict[int, Target] = {
    target.sm: target
    for target in (
        Target(75, "Turing, RTX 20", fp8=False, fp4=False),
        Target(80, "Ampere, A100", fp8=False, fp4=False),
        Target(86, "Ampere, RTX 30", fp8=False, fp4=False),
        Target(89, "Ada, RTX 40", fp8=True, fp4=False),
        Target(120, "Blackwell, RTX 50 and RTX PRO", fp8=True, fp4=True),
        Target(121, "Blackwell, GB10", fp8=True, fp4=True),
    )
}
"""SM version → target."""


def require(sm: int, formats: Iterable[str], span: Span | None = None) -> list[Diagnostic]:
    """Return what is wrong with building weights of `formats` for `sm`: nothing, E0502 or E0503s."""
    target = TARGETS.get(sm)
    if target is None:
        known = ", ".join(f"{t.sm} ({t.title})" for t in TARGETS.values())
        return [Diagnostic("E0502", f"no target SM {sm}", span, help=f"known: {known}")]
    faults: list[Diagnostic] = []
    for format_ in dict.fromkeys(formats):
        if not target.stores(format_):
            able = ", ".join(str(t.sm) for t in TARGETS.values() if t.stores(format_))
            kind = "FP4" if format_ in NVFP4_FORMATS else "FP8"
            message = f"SM {sm} ({target.title}) has no {kind} type for `{format_}` weights"
            faults.append(
                Diagnostic(
                    "E0503", message, span, help=f"build for SM {able}, or choose another format in [quantization]"
                )
            )
    return faults
