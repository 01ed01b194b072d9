"""The machine and the versions of a measurement."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from n3c.compiler.report.tool_versions import tool_versions


def describe() -> Iterator[str]:
    """Yield machine and versions as Markdown."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    versions = ", ".join(f"{name} {version}" for name, version in tool_versions().items())
    yield f"- measured: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    yield f"- machine: {_cpu()}, {os.cpu_count()} cores, {pages * size / 2**30:.1f} GiB, {platform.system()}"
    yield f"- versions: {versions}"


def load_note() -> str:
    """Return what else ran meanwhile, as far as the load average tells."""
    one, five, _ = os.getloadavg()
    return f"Load average after this benchmark: {one:.1f} (1 min), {five:.1f} (5 min) on {os.cpu_count()} cores."


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
