"""The table of docs/readers.md: what each reader makes of each checkpoint that n3c writes, in a few words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from .comparison import Difference
from .environment import READERS
from .written import FORMATS, KINDS


def matrix(found: Mapping[tuple[str, str, str], Difference]) -> str:
    """Return the table, in Markdown; `found` has a difference for each reader's title, kind and format."""
    lines = [f"| reader | model | {' | '.join(FORMATS)} |", f"|---|---|{'---|' * len(FORMATS)}"]
    for reader in READERS:
        for kind in KINDS:
            differences = [found[reader.title, kind, name] for name in FORMATS]
            title = f"{reader.title} {differences[0].version}"
            lines.append(f"| {title} | {kind} | {' | '.join(cell(difference) for difference in differences)} |")
    return "\n".join(lines) + "\n"


def cell(difference: Difference) -> str:
    """Return the words for one checkpoint: how many tensors agree, and what does not."""
    if difference.refused:
        return "refused"
    said = [str(difference.compared - len(difference.wrong))]
    said += [f"{len(difference.wrong)} wrong"] if difference.wrong else []
    said += [f"{len(difference.unread)} unread"] if difference.unread else []
    run = Counter(run or "floats" for _, run in difference.formats.values())
    said += [f"{count} run as {name}" for name, count in sorted(run.items())]
    said += [f"{len(difference.unusable)} unusable"] if difference.unusable else []
    return ", ".join(said)
