"""`inspect`: what a spec, a checkpoint or a build holds and costs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from n3c.backends.modelopt.record import RECORD, read_record
from n3c.backends.progress import SILENT, Progress
from n3c.backends.trt.targets import Flavour, served_gpus, sm_versions
from n3c.compiler.common_options import BATCH, CONTEXT, FORCE, HTML, MEMORY, SET, SM, TRT
from n3c.ir.diagnostics import Diagnostic, Severity, Span
from n3c.runtime.options import Argument, Needs, Option, checked, usage_error
from n3c.runtime.predicted import PredictedTime, predicted_times
from n3c.specs.files import require_new, write_text
from n3c.specs.schema import Spec

from .figures import inspect_spec
from .memory_fit import memory_of
from .notebook import framed
from .subject import Kind, is_build, is_spec, open_subject


@dataclass(frozen=True, slots=True)
class Inspected:
    """The result of `inspect`."""

    kind: Kind
    figures: dict[str, Any]
    """Of a build its manifest, with blocks and variants."""
    warnings: tuple[Diagnostic, ...]
    page: Callable[[], str] = field(repr=False, compare=False)
    """Returns all that there is to show as one page of HTML, offline and without libraries."""
    times: Mapping[str, Mapping[str, PredictedTime]] = field(default_factory=dict[str, Mapping[str, PredictedTime]])
    """Of a build with plans: entry point and batch size → GPU → predicted time."""

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c inspect --json`."""
        times = {entry: {gpu: time.as_json() for gpu, time in by_gpu.items()} for entry, by_gpu in self.times.items()}
        return self.figures | ({"time": times} if times else {})

    def _repr_html_(self) -> str:
        """Return the page in a frame, for notebooks."""
        return framed(self.page())


A_SPEC = Needs("path", test=is_spec, said="a SPEC (`n3c import` makes one)")
NO_BUILD = Needs("path", test=lambda path: not is_build(path), said="a SPEC or a CHECKPOINT, and this is a build")
FOR_PAGE = Needs("html")
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
    html: Annotated[Path | str | None, HTML] = None,
    original: Annotated[
        Path | str | None,
        Option("What a CHECKPOINT was quantized from: the page shows the error by layer and role.", needs=FOR_PAGE),
    ] = None,
    run: Annotated[
        Path | str | None, Option("Folder of a training run: the page shows its curves.", needs=FOR_PAGE)
    ] = None,
    force: Annotated[bool, replace(FORCE, needs=FOR_PAGE)] = False,
    progress: Progress = SILENT,
) -> Inspected:
    """Count parameters, FLOPs, weight and state bytes of a spec, a checkpoint (its config) or a build.

    `html` is a file for a page of HTML that shows it all; `n3c.compiler.inspect(…)` in a notebook shows the same.

    What fits is told for the GPUs that n3c knows, of those for what `sm` and `trt` leave, or for `memory`.
    N3CError: exit code 2 for options that do not go with what `path` is, 3 for a spec or config, 6 for files.
    """
    gpus = served_gpus(() if sm is None else sm_versions(sm), trt)
    if not gpus:
        raise usage_error(f"n3c knows no GPU of SM {sm} that this TensorRT serves: --memory SIZE tells of any other")
    subject = open_subject(path, set)
    if html is not None:
        read = (Path(place) for place in (original, run) if place is not None)
        require_new(Path(html), subject.place, *read, force=force)
    source = None if original is None else open_subject(original)
    if source is not None and (source.checkpoint is None or subject.checkpoint is None):
        raise usage_error("--original: both must be checkpoints with weights")
    warnings = [*subject.warnings]
    figures = inspect_spec(subject.spec, context=context, batch=batch, gpus=gpus, memory=memory_of(memory))
    if subject.checkpoint is not None:
        from n3c.backends.safetensors.inventory import inventory

        figures["checkpoint"] = inventory(subject.checkpoint).as_json()
        warnings += _unlike_record(subject.checkpoint.directory)

    def page() -> str:
        from .page.data import page_of
        from .page.render import render_page

        weights = None if source is None else source.checkpoint
        return render_page(page_of(subject, figures, progress, weights, None if run is None else Path(run)))

    if html is not None:
        write_text(Path(html), page())
    told, times = figures, dict[str, Mapping[str, PredictedTime]]()
    if subject.manifest is not None:
        assert subject.place is not None
        told = subject.manifest | {key: figures[key] for key in OF_BUILDS}
        times |= predicted_times(subject.place)
    return Inspected(subject.kind, told, tuple(warnings), page, times)


def _unlike_record(checkpoint: Path) -> list[Diagnostic]:
    """Return a warning for each file that is missing, or of another size than the checkpoint's record says."""
    found: list[Diagnostic] = []
    record = read_record(checkpoint)
    for row in record["files"] if record is not None else ():
        path = checkpoint / Path(row["path"]).name
        size = path.stat().st_size if path.is_file() else None
        if size != row["bytes"]:
            is_now = "missing" if size is None else f"of {size:,} bytes"
            message = f"`{path.name}` is {is_now}, and {RECORD} says {row['bytes']:,} bytes"
            found.append(Diagnostic("W0627", message, Span(str(path)), Severity.WARNING))
    return found
