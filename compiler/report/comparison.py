"""`diff`: what changed between two specs, checkpoints or builds."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

from n3c.backends.progress import SILENT, Progress
from n3c.compiler.common_options import BATCH, CONTEXT, FORCE, HTML
from n3c.passes.lower.model import lower
from n3c.passes.serving import serve
from n3c.runtime.options import Argument, Needs, Option, checked
from n3c.specs.files import require_new, write_text
from n3c.specs.schema import Spec

from .block_difference import compare_blocks
from .blocks import Block, blocks_of, places_of
from .build_difference import compare_builds
from .difference import Difference, FigureChange
from .figures import inspect_spec
from .ir_difference import compare_functions, function_texts
from .spec_difference import compare_specs
from .subject import open_subject


@checked
def diff(
    a: Annotated[Path | str | Spec, Argument("A")],
    b: Annotated[Path | str | Spec, Argument("B")],
    *,
    context: Annotated[int, replace(CONTEXT, help="Tokens in the cache of each sequence.")] = 8192,
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
        require_new(Path(html), *(subject.place for subject in subjects), force=force)
    progress.phase("compare specs")
    specs = [subject.spec for subject in subjects]
    blocks, functions, figures = zip(*(_compiled(spec, context, batch) for spec in specs), strict=True)
    tensors = None
    checkpoints = [subject.checkpoint for subject in subjects]
    if checkpoints[0] is not None and checkpoints[1] is not None:
        from .tensor_difference import compare_tensors

        tensors = compare_tensors(checkpoints[0], checkpoints[1], progress, headers_only=headers_only)
    builds = all(subject.kind == "build" for subject in subjects)

    def page() -> str:
        from .page.render import render_difference

        return render_difference(found)

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
        page=page,
    )
    if html is not None:
        write_text(Path(html), page())
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
