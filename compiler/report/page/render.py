"""Rendering: the data of a page, laid out by templates."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from n3c.backends.gpus import GPUS
from n3c.ir.types import DType
from n3c.specs.dump import dump_spec

from ..blocks import blocks_json
from ..units import format_bytes, format_count, format_operations
from .charts import Chart, curve_chart, known_cards, memory_chart, roofline_chart
from .data import Page, RoleError
from .ribbon import ribbon, titles

if TYPE_CHECKING:
    from ..difference import Difference

ROOFS = ("RTX 5090", "RTX PRO 6000", "H100 SXM", "B200")
"""GPUs whose roofs are drawn."""
LEAST_SPAN = 3.0
"""dB from the faintest color to the strongest, so that errors that are all alike look alike."""
FORMATS = ("nvfp4", "w4a16_nvfp4", "fp8", "bf16", "f32")
"""Formats that have a color of their own, the narrow ones first."""


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("n3c.compiler.report.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": format_bytes,
        "count": format_count,
        "operations": format_operations,
        "us": format_us,
    }
    return environment


def render_page(page: Page) -> str:
    """Return the page of a spec, a checkpoint or a build as HTML."""
    figures = page.figures
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            page=page,
            figures=figures,
            segments=ribbon(figures, page.subject.spec.model.pattern),
            titles=titles(),
            blocks_of={i: _labels(figures, i) for i in range(len(figures["variants"]))},
            gradients=[_gradient(variant["by_format"]) for variant in figures["variants"]],
            formats=[name for name in FORMATS if name in figures["weights"]["by_format"]],
            roles=_roles(figures),
            memory=_memory(page),
            roofline=_roofline(figures),
            heat=_heat(page.errors),
            charts=[chart for name in page.curves if (chart := curve_chart(name, page.curves[name]))],
            rows=list(_ledger(figures)),
            linears=_linears(page.audit or {}),
            times=list(_times(page.audit or {})),
            longest=math.log2(max(512, page.subject.spec.model.max_position_embeddings)),
            asked=math.log2(figures["decode"]["context"]),
            spec=dump_spec(page.subject.spec),
        )
    )


def render_difference(difference: Difference) -> str:
    """Return what differs of two specs, checkpoints or builds as HTML."""
    sides = (("a", difference.a, difference.blocks_a), ("b", difference.b, difference.blocks_b))
    blocks = [block for _, _, found in sides for block in found]
    variants = list(dict.fromkeys(block.variant for block in blocks))
    kinds = [variant.kind for variant in variants]
    return (
        _environment()
        .get_template("difference.html.jinja")
        .render(
            found=difference,
            sides=[
                (side, subject, ribbon(blocks_json(found, variants), subject.spec.model.pattern))
                for side, subject, found in sides
            ],
            changed={
                "a": {label for change in difference.blocks for label in change.labels_a},
                "b": {label for change in difference.blocks for label in change.labels_b},
            },
            kinds=kinds,
            titles=titles(),
            gradients=[_gradient(variant.by_format()) for variant in variants],
            formats=[name for name in FORMATS if any(name in variant.by_format() for variant in variants)],
        )
    )


def format_us(value: float) -> str:
    """Return a time that is given in microseconds: `1.53 ms`."""
    for unit in ("µs", "ms"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} s"


@dataclass(frozen=True, slots=True)
class Role:
    """A row of the table by role."""

    name: str
    parameters: int
    share: float
    """Of all parameters."""
    by_format: Mapping[str, int]
    bytes: int


def _roles(figures: Mapping[str, Any]) -> list[Role]:
    """Return what each role holds, the most bytes first."""
    sizes: dict[str, dict[str, int]] = {}
    for block in figures["blocks"]:
        for weight in figures["variants"][block["variant"]]["weights"]:
            held = sizes.setdefault(weight["role"], {})
            held[weight["format"]] = held.get(weight["format"], 0) + weight["bytes"]
    counts = figures["parameters"]["by_role"]
    total = sum(counts.values())
    rows = [
        Role(role, counts.get(role, 0), counts.get(role, 0) / total, _ordered(held), sum(held.values()))
        for role, held in sizes.items()
    ]
    return sorted(rows, key=lambda row: -row.bytes)


def _ordered(by_format: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(by_format.items(), key=lambda item: FORMATS.index(item[0]) if item[0] in FORMATS else 99))


def _labels(figures: Mapping[str, Any], variant: int) -> list[str]:
    return [block["label"] for block in figures["blocks"] if block["variant"] == variant]


def _gradient(by_format: Mapping[str, int]) -> str:
    """Return a CSS gradient with a stripe for each format, as wide as its share of the bytes."""
    total, at, stripes = sum(by_format.values()), 0.0, list[str]()
    for name, size in _ordered(by_format).items():
        end = at + 100 * size / total
        color = name if name in FORMATS else "other"
        stripes.append(f"var(--{color}) {at:.0f}% {end:.0f}%")
        at = end
    return f"linear-gradient(90deg,{','.join(stripes)})" if stripes else "none"


def _memory(page: Page) -> Chart:
    state = page.figures["state"]
    return memory_chart(
        page.figures["weights"]["bytes"],
        state["bytes_per_request"] + state["snapshots"]["pending_bytes"],
        state["kv_bytes_per_token"] + state["mtp_kv_bytes_per_token"],
        page.subject.spec.model.max_position_embeddings,
        known_cards(),
    )


def _roofline(figures: Mapping[str, Any]) -> Chart:
    widest = next(DType(entry["dtype"]) for entry in figures["entries"] if entry["entry"] == "decode")
    gpus = [(name, GPUS[name].bandwidth, GPUS[name].peak(widest)) for name in ROOFS]
    entries = [(entry["entry"], entry["flops"] / entry["bytes"]) for entry in figures["entries"]]
    return roofline_chart(entries, gpus)


@dataclass(frozen=True, slots=True)
class Heat:
    """Errors by layer and role: columns are layers, rows roles."""

    layers: Sequence[int | None]
    rows: Sequence[tuple[str, Sequence[RoleError | None]]]
    low: float
    high: float

    def shade(self, error: RoleError) -> int:
        """Return 0 for the smallest error to 100 for the largest, on a logarithmic scale."""
        return round(100 * (self.high - error.sqnr) / max(self.high - self.low, LEAST_SPAN))


def _heat(errors: Iterable[RoleError]) -> Heat | None:
    found = {(error.role, error.layer): error for error in errors}
    if not found:
        return None
    layers = sorted({layer for _, layer in found}, key=lambda layer: (layer is None, layer or 0))
    rows = [(role, [found.get((role, layer)) for layer in layers]) for role in dict.fromkeys(r for r, _ in found)]
    ratios = [error.sqnr for error in found.values()]
    return Heat(layers, rows, min(ratios), max(ratios))


def _ledger(figures: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every weight with its full name."""
    for block in figures["blocks"]:
        for weight in figures["variants"][block["variant"]]["weights"]:
            yield f"{block['label']}.{weight['name']}", weight


def _times(audit: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the times that the audit predicts, of each entry point on each GPU."""
    for entry, gpus in audit.get("time", {}).items():
        for gpu, time in gpus.items():
            yield {"entry": entry, "gpu": gpu, **time}


def _linears(audit: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the verdicts on linears, those that agree in everything but the layer in one row."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for found in audit.get("linears", ()):
        name = re.sub(r"\.\d+\.", ".*.", found["name"])
        key = (name, found["plan"], found["requested"], found["realised"])
        ok = found["realised"] in (found["requested"], found.get("expected"))
        row = rows.setdefault(key, {**found, "name": name, "count": 0, "ok": ok})
        row["count"] += 1
    return sorted(rows.values(), key=lambda row: row["ok"])
