"""`inspect`: what a spec, a checkpoint or a build holds and costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from n3c.backends.trt.targets import Flavour, served_gpus, sm_versions
from n3c.compiler.common_options import BATCH, CONTEXT, MEMORY, SET, SM, TRT
from n3c.ir.diagnostics import Diagnostic
from n3c.runtime.manifest import MANIFEST, out_error, read_manifest
from n3c.runtime.options import Argument, Needs, checked, usage_error
from n3c.specs.load import loaded
from n3c.specs.schema import Spec
from n3c.specs.shipped import spec_file

from .cost import inspect_spec
from .memory_fit import memory_of


@dataclass(frozen=True, slots=True)
class Inspected:
    """The result of `inspect`."""

    kind: Literal["spec", "checkpoint", "build"]
    figures: dict[str, Any]
    """Of a build its manifest."""
    warnings: tuple[Diagnostic, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c inspect --json`."""
        return self.figures


def _is_spec(path: Path | str | Spec) -> bool:
    return isinstance(path, Spec) or not (Path(path).is_dir() or Path(path).suffix == ".json")


def _is_build(path: Path | str | Spec) -> bool:
    return not isinstance(path, Spec) and (Path(path) / MANIFEST).is_file()


A_SPEC = Needs("path", test=_is_spec, said="a SPEC (`n3c import` makes one)")
NO_BUILD = Needs("path", test=lambda path: not _is_build(path), said="a SPEC or a CHECKPOINT, and this is a build")


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
    figures_of = partial(inspect_spec, context=context, batch=batch, gpus=gpus, memory=memory_of(memory))
    if isinstance(path, Spec):
        return _of_spec(path, set, figures_of)
    place = Path(path) if Path(path).is_dir() else spec_file(path)
    if not place.is_file() and place.suffix not in (".toml", ".json"):
        from n3c.backends.safetensors.locate import checkpoint_directory

        place = checkpoint_directory(path)
    if _is_build(place):
        manifest = read_manifest(place)
        if manifest is None:
            raise out_error("E0614", f"{MANIFEST} is not one of n3c", place / MANIFEST)
        return Inspected("build", manifest)
    if _is_spec(place):
        return _of_spec(place, set, figures_of)
    from n3c.backends.safetensors.imported_spec import import_checkpoint

    imported = import_checkpoint(place, formats_matter=False)
    figures = figures_of(imported.spec)
    if place.is_dir() and any(place.glob("*.safetensors*")):
        from n3c.backends.safetensors.checkpoint import Checkpoint
        from n3c.backends.safetensors.inventory import inventory

        figures["checkpoint"] = inventory(Checkpoint(place)).as_json()
    return Inspected("checkpoint", figures, imported.warnings)


def _of_spec(spec: Path | Spec, overrides: Sequence[str], figures_of: Callable[[Spec], dict[str, Any]]) -> Inspected:
    read, warnings = loaded(spec, overrides)
    return Inspected("spec", figures_of(read), tuple(warnings))
