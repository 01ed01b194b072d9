"""Diagnostics for machines that show them beside the line: GitHub Actions, and whatever reads SARIF."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import quote

from n3c.ir.diagnostics import Diagnostic, Severity

GITHUB = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.NOTE: "notice"}


def github(diagnostics: Iterable[Diagnostic]) -> Iterator[str]:
    """Yield a workflow command of GitHub Actions for each diagnostic: `::error file=…,line=…::message`."""
    for found in diagnostics:
        properties: dict[str, str] = {}
        if found.span is not None:
            span = found.span
            properties = {
                "file": span.file,
                "line": str(span.line),
                "col": str(span.column),
                "endColumn": str(span.column + span.length),
            }
        properties["title"] = found.code
        listed = ",".join(f"{name}={_escaped(value, ':,')}" for name, value in properties.items())
        yield f"::{GITHUB[found.severity]} {listed}::{_escaped(_message(found))}"


def sarif(diagnostics: Sequence[Diagnostic]) -> dict[str, Any]:
    """Return diagnostics as a SARIF 2.1.0 log of one run."""
    rules = [{"id": code} for code in sorted({found.code for found in diagnostics})]
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": {"name": "n3c", "rules": rules}},
                "columnKind": "unicodeCodePoints",
                "results": [_sarif_result(found) for found in diagnostics],
            }
        ],
    }


def _sarif_result(found: Diagnostic) -> dict[str, Any]:
    result: dict[str, Any] = {
        "ruleId": found.code,
        "level": found.severity.value,
        "message": {"text": _message(found)},
    }
    if found.span is not None:
        span = found.span
        region = {"startLine": span.line, "startColumn": span.column, "endColumn": span.column + span.length}
        place = {"artifactLocation": {"uri": quote(span.file)}, "region": region}
        result["locations"] = [{"physicalLocation": place}]
    return result


def _message(found: Diagnostic) -> str:
    return found.message if found.help is None else f"{found.message}\n{found.help}"


def _escaped(text: str, more: str = "") -> str:
    """Escape what ends a value of a workflow command; of a property also what is in `more`."""
    return "".join(f"%{ord(c):02X}" if c in f"%\r\n{more}" else c for c in text)
