"""What a report is about: a spec, a checkpoint with its config, or a build with its spec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from n3c.ir.diagnostics import Diagnostic
from n3c.runtime.manifest import MANIFEST, out_error, read_manifest
from n3c.specs.load import load_spec, loaded
from n3c.specs.schema import Spec
from n3c.specs.shipped import spec_file

if TYPE_CHECKING:
    from n3c.backends.safetensors.checkpoint import Checkpoint

Kind = Literal["spec", "checkpoint", "build"]
BUILT_SPEC = "spec.toml"


@dataclass(frozen=True)
class Subject:
    """A spec, a checkpoint or a build, opened as far as reports need it."""

    kind: Kind
    given: str
    """As the user named it."""
    place: Path | None
    """None for a loaded spec."""
    read: Spec | None
    """None for a build, whose spec is read on demand."""
    warnings: tuple[Diagnostic, ...] = ()
    manifest: dict[str, Any] | None = None
    """Of a build."""

    @cached_property
    def spec(self) -> Spec:
        """Return the spec; of a build the one that it was built from (N3CError where that cannot be read)."""
        if self.read is not None:
            return self.read
        assert self.place is not None
        return load_spec(self.place / BUILT_SPEC)[0]

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        """Return the tensors of a checkpoint, where it has any besides its config."""
        if self.kind != "checkpoint" or self.place is None or not self.place.is_dir():
            return None
        if not any(self.place.glob("*.safetensors*")):
            return None
        from n3c.backends.safetensors.checkpoint import Checkpoint

        return Checkpoint(self.place)


def is_spec(given: Path | str | Spec) -> bool:
    """Whether `given` is a spec, as far as its name tells."""
    return isinstance(given, Spec) or not (Path(given).is_dir() or Path(given).suffix == ".json")


def is_build(given: Path | str | Spec) -> bool:
    """Whether `given` is the folder of a build."""
    return not isinstance(given, Spec) and (Path(given) / MANIFEST).is_file()


def open_subject(given: Path | str | Spec, overrides: Sequence[str] = ()) -> Subject:
    """Open what a user names; N3CError (exit code 3 or 6) where it is none of the three."""
    if isinstance(given, Spec):
        read, warnings = loaded(given, overrides)
        return Subject("spec", given.name, None, read, tuple(warnings))
    place = Path(given) if Path(given).is_dir() else spec_file(given)
    if not place.is_file() and place.suffix not in (".toml", ".json") and str(given) != "-":
        from n3c.backends.safetensors.locate import checkpoint_directory

        place = checkpoint_directory(given)
    if is_build(place):
        manifest = read_manifest(place)
        if manifest is None:
            raise out_error("E0614", f"{MANIFEST} is not one of n3c", place / MANIFEST)
        return Subject("build", str(given), place, None, (), manifest)
    if is_spec(place):
        read, warnings = loaded(place, overrides)
        return Subject("spec", str(given), place, read, tuple(warnings))
    from n3c.backends.safetensors.imported_spec import import_checkpoint

    imported = import_checkpoint(place, formats_matter=False)
    return Subject("checkpoint", str(given), place, imported.spec, imported.warnings)
