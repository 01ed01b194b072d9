"""`n3c verify`: run every implementation of a build through the same steps and tell what differs."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from n3c.backends.modelopt.record import read_record
from n3c.backends.progress import SILENT, Progress
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.runtime.build_folder import open_build
from n3c.runtime.manifest import MANIFEST, verify_files
from n3c.runtime.options import Argument, Option, checked, usage_error

if TYPE_CHECKING:  # these load numpy and ONNX
    from .comparison import Verdict
    from .implementations import Skipped


@dataclass(frozen=True, slots=True)
class Verified:
    """How the implementations of a build compare with the reference."""

    build: Path
    weights: str
    """The checkpoint's directory, or which random weights were taken."""
    verdicts: "tuple[Verdict, ...]"
    """One for each implementation that was compared."""
    not_compared: "tuple[Skipped, ...]"
    diagnostics: tuple[Diagnostic, ...]
    """Differences and failures, at the spec lines of their layers; empty where all agree."""

    @property
    def ok(self) -> bool:
        """Whether every implementation that was compared agrees everywhere."""
        return not self.diagnostics

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c verify --json`."""
        return {
            "ok": self.ok,
            "weights": self.weights,
            "implementations": [verdict.as_json() for verdict in self.verdicts],
            "not_compared": [{"name": skipped.name, "reason": skipped.reason} for skipped in self.not_compared],
            "diagnostics": [diagnostic.as_json() for diagnostic in self.diagnostics],
        }


@checked
def verify(
    build: Annotated[Path | str, Argument("BUILD|CHECKPOINT")],
    weights: Annotated[
        Path | str | None, Option("Checkpoint directory or hub id (default: random weights).", metavar="DIR")
    ] = None,
    *,
    seed: Annotated[int, Option("Of tokens and random weights.", least=0)] = 0,
    progress: Progress = SILENT,
) -> Verified:
    """Compare all implementations in `build` with the weights of a checkpoint, or with random ones made from `seed`.

    Of a quantized checkpoint, which has a record, every file is compared with that.

    What differs is in the result. N3CError where nothing can be compared: exit code 2 for a seed that is negative or
    beyond int64, and where the build holds its weights and none are named; 4 where the model is too large; 6 where a
    file is not what was built or the checkpoint does not fit.
    """
    progress.phase("open")
    recorded = None if (Path(build) / MANIFEST).is_file() else read_record(Path(build))
    if recorded is not None:
        return _as_recorded(Path(build), recorded, weights)
    opened = open_build(Path(build))
    from n3c.backends.safetensors.locate import checkpoint_directory

    from .comparison import compare, diagnostics
    from .implementations import implementations
    from .model_size import require_small
    from .reference import references
    from .scenario import scenarios
    from .weights import checkpoint_for

    require_small(opened)
    checkpoint = checkpoint_for(opened, None if weights is None else checkpoint_directory(weights), seed)
    program, batch = opened.served.program, min(opened.spec.serving.batch_sizes)
    progress.phase("load")
    expected = references(opened, checkpoint, batch)
    compared, skipped = implementations(opened, checkpoint, batch)
    progress.phase("compare")
    verdicts = compare(expected, compared, program, scenarios(opened.spec, program, batch, seed), progress)
    found = diagnostics(verdicts, program, str(build))
    return Verified(Path(build), str(checkpoint.directory), tuple(verdicts), tuple(skipped), tuple(found))


def _as_recorded(checkpoint: Path, record: dict[str, Any], weights: Path | str | None) -> Verified:
    """Return that a checkpoint is what its record says; N3CError (exit code 6) names the files that are not."""
    if weights is not None:
        raise usage_error("--weights has no effect: it needs a BUILD, and this is a checkpoint")
    faults = verify_files(checkpoint, record)
    if faults:
        raise N3CError(faults, ExitCode.FILE)
    return Verified(checkpoint, str(checkpoint), (), (), ())
