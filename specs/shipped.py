"""The specs that n3c ships, each usable by the name of its file: `n3c check super`."""

from __future__ import annotations

from pathlib import Path

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span, did_you_mean

from .places import shown

STDIN = "-"
"""The SPEC that is read from standard input."""


def shipped_specs() -> dict[str, Path]:
    """Return the shipped specs: name → file."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.toml"), key=lambda path: path.stem)}


def spec_file(given: str | Path) -> Path:
    """Return the file that a user means by SPEC: that of the name, or else the shipped spec.

    N3CError (E0601, exit code 6) for a bare word that is neither.
    """
    path = Path(given)
    if path.suffix or path.name != str(given) or str(given) == STDIN or _exists(path):
        return path
    specs = shipped_specs()
    if path.name in specs:
        return specs[path.name]
    message = f"cannot read {shown(str(path))}: no such file, and no shipped spec of that name"
    help_ = did_you_mean(path.name[:80], specs) or f"shipped: {', '.join(specs)}"
    raise N3CError(Diagnostic("E0601", message, Span(str(path)), help=help_), ExitCode.FILE)


def _exists(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except (OSError, ValueError):  # a name that is too long, or with a null byte
        return True
