"""Hugging Face configs to specs and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from n3c.compiler.common_options import FORCE, SET, SPEC
from n3c.ir.diagnostics import Diagnostic
from n3c.runtime.options import Argument, Option, checked
from n3c.specs.convert import config_text
from n3c.specs.files import output_file, require_new, write_text
from n3c.specs.huggingface import export_config as exported
from n3c.specs.load import loaded
from n3c.specs.schema import Spec


@dataclass(frozen=True, slots=True)
class _Converted:
    """A spec, and the text that a conversion gave."""

    spec: Spec
    text: str
    """The spec as TOML, or the config as JSON."""
    out: Path | None
    """Where the text was written."""
    warnings: tuple[Diagnostic, ...]


@dataclass(frozen=True, slots=True)
class ImportedConfig(_Converted):
    """A spec made from a config, and its TOML text."""

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c import --json`."""
        return {
            "ok": True,
            "name": self.spec.name,
            "out": str(self.out) if self.out else None,
            "spec": self.text,
            "diagnostics": [warning.as_json() for warning in self.warnings],
        }


@dataclass(frozen=True, slots=True)
class ExportedConfig(_Converted):
    """A config made from a spec, and its JSON text."""

    config: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c export-config --json`."""
        return {
            "ok": True,
            "out": str(self.out) if self.out else None,
            "config": self.config,
            "diagnostics": [warning.as_json() for warning in self.warnings],
        }


@checked
def import_config(
    source: Annotated[Path | str, Argument("CONFIG_JSON|CHECKPOINT_DIR")],
    *,
    output: Annotated[
        Path | str | None, Option("Where to write the spec (default: stdout, as for -).", short="-o")
    ] = None,
    force: Annotated[bool, FORCE] = False,
) -> ImportedConfig:
    """Turn a Hugging Face nemotron_h config.json, or a checkpoint directory with one, into a spec.

    N3CError: exit code 3 for the config, 6 for files; an `output` that is there is left without `force`.
    """
    from n3c.backends.safetensors.imported_spec import import_checkpoint
    from n3c.backends.safetensors.locate import checkpoint_directory

    read, out = checkpoint_directory(source), output_file(output)
    if out is not None:
        require_new(out, read, force=force)
    imported = import_checkpoint(read)
    if out is not None:
        write_text(out, imported.text)
    return ImportedConfig(imported.spec, imported.text, out, imported.warnings)


@checked
def export_config(
    spec: Annotated[Path | str | Spec, SPEC],
    *,
    output: Annotated[Path | str | None, Option("Where to write it (default: stdout, as for -).", short="-o")] = None,
    force: Annotated[bool, FORCE] = False,
    set: Annotated[Sequence[str], SET] = (),
) -> ExportedConfig:
    """Turn a spec into a Hugging Face nemotron_h config.json.

    N3CError: exit code 3 for the spec, 6 for files; an `output` that is there is left without `force`.
    """
    out = output_file(output)
    if out is not None:
        require_new(out, None if isinstance(spec, Spec) else Path(spec), force=force)
    read, warnings = loaded(spec, set)
    text = config_text(read)
    if out is not None:
        write_text(out, text)
    return ExportedConfig(read, text, out, tuple(warnings), exported(read))
