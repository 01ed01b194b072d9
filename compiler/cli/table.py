"""Tables for people: as wide as the terminal, one row a line in a pipe or a file."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence

from n3c.ir.text import escaped

_FIGURE = re.compile(r"(x )?[-+]?[\d,]+(\.\d+)?(e[-+]\d+)?x?( ?[%\w/]{1,6})?")
"""A number with its unit: `1,048,576`, `9.45 GB`, `0.01 %`, `x 0.940`."""
_UNBOUNDED = 10**5


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned columns: text to the left, wrapped where a terminal is too narrow; figures to the right.

    A column is one of figures if its first cell that is not empty is. In a pipe or a file each row is one line.
    """
    import shutil  # here, as `n3c check` starts faster without any of these

    from rich.box import Box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rule = Box("    \n    \n -  \n    \n    \n    \n    \n    \n", ascii=True)
    table = Table(box=rule, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="")
    cells = [[escaped(cell) for cell in row] for row in rows]
    for title, *column in zip(header, *cells, strict=True):
        figures = _FIGURE.fullmatch(next(filter(None, column), "")) is not None
        widest = max(map(len, column)) if figures else None  # of a figure only the title is wrapped
        table.add_column(Text(title), justify="right" if figures else "left", min_width=widest, overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))  # as `Text` names are no markup
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _UNBOUNDED
    written = io.StringIO()  # a console of its own does not touch stdout, which can be full
    console = Console(
        file=written, width=width, color_system=None, no_color=True, legacy_windows=False, force_terminal=False
    )
    console.print(table)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())


def format_peak(size: int | None) -> str:
    """Return how the last line of a command goes on about peak memory; empty where the system does not tell it."""
    return "" if size is None else f", peak memory {size / 2**30:.2f} GiB"
