"""`inspect`: what a spec, a checkpoint or a build holds and costs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from n3c.backends.trt.targets import Flavour, served_gpus, sm_versions
from n3c.compiler.common_options import BATCH, CONTEXT, MEMORY, SET, SM, TRT
from n3c.ir.diagnostics import Diagnostic
from n3c.runtime.options import Argument, Needs, checked, usage_error
from n3c.specs.schema import Spec

from .figures import inspect_spec
from .memory_fit import memory_of
from .subject import Kind, is_build, is_spec, open_subject


@dataclass(frozen=True, slots=True)
class Inspected:
    """The result of `inspect`."""

    kind: Kind
    figures: dict[str, Any]
    """Of a build its manifest."""
    warnings: tuple[Diagnostic, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c inspect --json`."""
        return self.figures


A_SPEC = Needs("path", test=is_spec, said="a SPEC (`n3c import` makes one)")
NO_BUILD = Needs("path", test=lambda path: not is_build(path), said="a SPEC or a CHECKPOINT, and this is a build")
OF_BUILDS = ("blocks", "variants")
"""Figures of its spec that are told of a build besides its manifest."""


@checked
def inspect(
    path: Annotated[Path | str | Spec, Argument("SPEC|CHECKPOINT|BUILD")],
    *,
    context: Annotated[int | None, replace(CONTEXT, needs=NO_BUILD)] = None,
    batch: Annotated[int, replace(BATCH, needs=NO_BUILD)] = 1,
    sm: Annotated[
        int | str | Sequence[int] | None, replace(SM, help="Say what fits GPUs of these architectures.", needs=NO_BUILD)
    ] = None,
    trt: Annotated[Flavour | None, replace(TRT, help="Say what fits GPUs that it serves.", needs=NO_BUILD)] = None,
    memory: Annotated[int | str | None, replace(MEMORY, needs=NO_BUILD)] = None,
    set: Annotated[Sequence[str], replace(SET, needs=A_SPEC)] = (),
) -> Inspected:
    """Count parameters, FLOPs, weight and state bytes of a spec, a checkpoint (its config) or a build.

    What fits is told for the GPUs that n3c knows, of those for what `sm` and `trt` leave, or for `memory`.
    N3CError: exit code 2 for options that do not go with what `path` is, 3 for a spec or config, 6 for files.
    """
    gpus = served_gpus(() if sm is None else sm_versions(sm), trt)
    if not gpus:
        raise usage_error(f"n3c knows no GPU of SM {sm} that this TensorRT serves: --memory SIZE tells of any other")
    subject = open_subject(path, set)
    figures = inspect_spec(subject.spec, context=context, batch=batch, gpus=gpus, memory=memory_of(memory))
    if subject.manifest is not None:
        return Inspected("build", subject.manifest | {key: figures[key] for key in OF_BUILDS})
    if subject.checkpoint is not None:
        from n3c.backends.safetensors.inventory import inventory

        figures["checkpoint"] = inventory(subject.checkpoint).as_json()
    return Inspected(subject.kind, figures, subject.warnings)
