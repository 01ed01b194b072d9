"""The shell blocks of a page of documentation, in order; those that need a GPU or hours are marked in the page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(
    r"^(?:\*Not run by the test: (?P<why>[^*]+)\*\n\n)?```sh\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Block:
    """A block of shell commands."""

    code: str
    why_not: str | None
    """What it needs that tests do not have, as the line before it says; None for a block that is run."""


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page that begin with ```` ```sh ````."""
    found = _FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Block(match["code"], match["why"]) for match in found]
