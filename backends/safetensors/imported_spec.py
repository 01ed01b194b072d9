"""The spec of a checkpoint: of its config, as far as its tensors go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from n3c.ir.diagnostics import Diagnostic, N3CError, Severity, Span
from n3c.specs.convert import Imported, run_import

from .checkpoint import Checkpoint


def import_checkpoint(source: Path, *, formats_matter: bool = True) -> Imported:
    """Import a config.json or a checkpoint folder, as `run_import` does; N3CError where it cannot be.

    transformers keeps what the config says of multi-token prediction and drops its weights: such a checkpoint gives a
    spec without [mtp], and a warning. Tensors that cannot be read are left to those who need them.
    """
    imported = run_import(source, formats_matter=formats_matter)
    if imported.spec.mtp is None or not source.is_dir():
        return imported
    try:
        checkpoint = Checkpoint(source)
    except N3CError:
        return imported
    if any(name.startswith("mtp.") for name in checkpoint):
        return imported
    message = "the checkpoint has no `mtp.*` tensors, which transformers drops: the spec is without [mtp]"
    help_ = "take them from the released checkpoint, if multi-token prediction is wanted"
    warning = Diagnostic("W0304", message, Span(str(source / "config.json")), Severity.WARNING, help_)
    trunk = run_import(source, formats_matter=formats_matter, with_mtp=False)
    return replace(trunk, warnings=(*trunk.warnings, warning))
