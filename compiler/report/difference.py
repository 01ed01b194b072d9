"""`diff`: what changed between two specs, checkpoints or builds."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

from n3c.backends.progress import SILENT, Progress
from n3c.compiler.common_options import BATCH, CONTEXT, FORCE, HTML
from n3c.ir.diagnostics import Diagnostic
from n3c.passes.lower.model import lower
from n3c.passes.serving import serve
from n3c.runtime.options import Argument, Needs, Option, checked
from n3c.specs.files import require_new, write_text
from n3c.specs.schema import Spec

from .block_difference import BlockDifference, compare_blocks
from .blocks import Block, blocks_of, places_of
from .build_difference import compare_builds
from .figures import inspect_spec
from .ir_difference import FunctionDifference, compare_functions, function_texts
from .notebook import framed
from .spec_difference import Change, compare_specs
from .subject import Subject, open_subject


@dataclass(frozen=True, slots=True)
class FigureChange:
    """A figure of `inspect` that two models have differently."""

    figure: str
    a: int
    b: int

    @property
    def ratio(self) -> float | None:
        """Return b / a; None where a is 0."""
        return self.b / self.a if self.a else None

    def as_json(self) -> dict[str, Any]:
        """Return one entry of `diff --json`, key `figures`."""
        return {"figure": self.figure, "a": self.a, "b": self.b, "ratio": self.ratio}


@dataclass(frozen=True, slots=True)
class Difference:
    """The result of `diff`."""

    a: Subject
    b: Subject
    blocks_a: tuple[Block, ...]
    blocks_b: tuple[Block, ...]
    spec: tuple[Change, ...]
    figures: tuple[FigureChange, ...]
    blocks: tuple[BlockDifference, ...]
    ir: tuple[FunctionDifference, ...]
    build: tuple[Change, ...]
    """Of two builds: tools, options, files, audits."""
    tensors: Any
    """A `TensorDifference`, of two checkpoints with weights; otherwise None."""
    warnings: tuple[Diagnostic, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not any((self.spec, self.figures, self.blocks, self.ir, self.build, self.tensors))

    def page(self) -> str:
        """Return all differences as one page of HTML, offline and without libraries."""
        from .page.render import render_difference

        return render_difference(self)

    def _repr_html_(self) -> str:
        """Return the page in a frame, for notebooks."""
        return framed(self.page())

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c diff --json`."""
        return {
            "equal": self.equal,
            "a": {"path": self.a.given, "kind": self.a.kind, "name": self.a.spec.name},
            "b": {"path": self.b.given, "kind": self.b.kind, "name": self.b.spec.name},
            "spec": [change.as_json() for change in self.spec],
            "figures": [change.as_json() for change in self.figures],
            "blocks": [change.as_json() for change in self.blocks],
            "ir": [change.as_json() for change in self.ir],
            "build": [change.as_json() for change in self.build],
            "tensors": None if self.tensors is None else self.tensors.as_json(),
            "diagnostics": [warning.as_json() for warning in self.warnings],
        }


@checked
def diff(
    a: Annotated[Path | str | Spec, Argument("A")],
    b: Annotated[Path | str | Spec, Argument("B")],
    *,
    context: Annotated[int, CONTEXT] = 8192,
    batch: Annotated[int, BATCH] = 1,
    html: Annotated[Path | str | None, HTML] = None,
    force: Annotated[bool, replace(FORCE, needs=Needs("html"))] = False,
    headers_only: Annotated[bool, Option("Compare names, shapes and formats of weights, not their values.")] = False,
    progress: Progress = SILENT,
) -> Difference:
    """Compare two specs, checkpoints or builds.

    Of each the spec is compared: keys, figures at `context` and `batch`, blocks, the program of serving. Of two
    checkpoints also the weights, of two builds the files and audits. N3CError: exit code 3 or 6.
    """
    subjects = open_subject(a), open_subject(b)
    if html is not None:
        for subject in subjects:
            require_new(Path(html), subject.place, force=force)
    progress.phase("compare specs")
    specs = [subject.spec for subject in subjects]
    blocks, functions, figures = zip(*(_compiled(spec, context, batch) for spec in specs), strict=True)
    tensors = None
    checkpoints = [subject.checkpoint for subject in subjects]
    if checkpoints[0] is not None and checkpoints[1] is not None:
        from .tensor_difference import compare_tensors

        tensors = compare_tensors(checkpoints[0], checkpoints[1], progress, headers_only=headers_only)
    builds = all(subject.kind == "build" for subject in subjects)
    found = Difference(
        a=subjects[0],
        b=subjects[1],
        blocks_a=tuple(blocks[0]),
        blocks_b=tuple(blocks[1]),
        spec=compare_specs(*specs),
        figures=_compare_figures(*figures),
        blocks=compare_blocks(*blocks),
        ir=compare_functions(*functions),
        build=compare_builds(*subjects) if builds else (),
        tensors=tensors,
        warnings=subjects[0].warnings + subjects[1].warnings,
    )
    if html is not None:
        write_text(Path(html), found.page())
    return found


def _compiled(spec: Spec, context: int, batch: int) -> tuple[list[Block], dict[str, list[str]], dict[str, int]]:
    """Return the blocks of a model, the functions of its program of serving, and its figures."""
    lowered = lower(spec)
    places = places_of(lowered, context)
    served = serve(spec, lowered=lowered)
    blocks = blocks_of(places, served, len(spec.model.pattern))
    figures = inspect_spec(spec, context=context, batch=batch)
    told: dict[str, Any] = {
        key: figures[key] for key in ("layers", "parameters", "flops_per_token", "weights", "state")
    }
    told["decode"] = {"bytes": figures["decode"]["bytes"], "memory_bytes": figures["decode"]["memory_bytes"]}
    return blocks, function_texts(served.program), dict(_flat(told))


def _flat(figures: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, int]]:
    for name, value in figures.items():
        key = f"{path}.{name}".removeprefix(".")
        if isinstance(value, dict):
            yield from _flat(cast("dict[str, Any]", value), key)
        else:
            yield key, value


def _compare_figures(a: Mapping[str, int], b: Mapping[str, int]) -> tuple[FigureChange, ...]:
    changes = (FigureChange(key, a.get(key, 0), b.get(key, 0)) for key in dict.fromkeys((*a, *b)))
    return tuple(change for change in changes if change.a != change.b)
