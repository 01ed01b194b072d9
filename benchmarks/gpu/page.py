"""The report as Markdown: a table a part, kernels below it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any


def page(report: Mapping[str, Any]) -> str:
    """Return the page of what was measured so far."""
    lines = [f"- {key}: {value}" for key, value in report["about"].items()]
    for name, part in report["parts"].items():
        lines += ["", f"## {_title(name)}", ""]
        if "skipped" in part:
            lines.append(f"Skipped: {part['skipped']}.")
            continue
        lines += _tables([row for row in part["rows"] if "table" not in row])
        for row in part["rows"]:
            if "table" in row:
                lines += ["", f"Kernels: {row['kernels']}", "", *_table(row["table"][:12])]
        lines += ["", f"{part['seconds']} s" + (f"; {part['problem']}" if "problem" in part else "") + "."]
    return "\n".join(lines) + "\n"


def _title(name: str) -> str:
    from .run import PARTS

    title: str = importlib.import_module(f"benchmarks.gpu.{PARTS[name].module}").TITLE
    return title


def _tables(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a table for each run of rows with the same columns."""
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or list(rows[end]) != list(rows[start]):
            yield from [*([""] if start else []), *_table(rows[start:end])]
            start = end


def _table(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(rows[0])
    body = ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in rows]
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *body]


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
