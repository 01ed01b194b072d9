"""`--auto`: sensitivity of every unit, the choice within the budget, and the spec that says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from n3c.backends.progress import Progress
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.compiler.quantization.calibration.calibrate import Amax, calibrate
from n3c.compiler.quantization.calibration.streamed_model import StreamedModel
from n3c.compiler.quantization.units import Unit, find_units, unit_name
from n3c.ir.formats import FORMATS
from n3c.specs.modules import Group, groups_of
from n3c.specs.recipe import DEFAULT
from n3c.specs.rules_table import rules_table, spec_with_table
from n3c.specs.schema import Quantization, Spec

from .budget import choose, mean_bits, require_feasible
from .noise import Scores, noise_scores
from .second_order import KeptInputs, second_order_scores

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Chosen:
    """Formats within a budget, with the scores that decided."""

    spec: Spec
    """With the rules that say them."""
    units: Sequence[Unit]
    formats: dict[str, str]
    """Unit → format."""
    scores: Scores
    bits: float
    """Mean bits a weight, over the weights of the units."""
    method: str
    amax: Amax | None
    """The calibrated magnitudes, where there was data."""

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c quantize --auto --json`, key `auto`."""
        return {
            "method": self.method,
            "effective_bits": self.bits,
            "units": [
                {
                    "name": unit.name,
                    "weights": unit.weights,
                    "format": self.formats[unit.name],
                    "scores": self.scores[unit.name],
                }
                for unit in self.units
            ],
        }


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The harm of each format to every unit; `within` chooses."""

    spec: Spec
    units: Sequence[Unit]
    scores: Scores
    method: str
    """`weight noise` or `second order`."""
    amax: Amax | None = None
    """The calibrated magnitudes, where there was data."""

    def within(self, effective_bits: float) -> Chosen:
        """Return the formats of least harm whose mean is at most `effective_bits`; N3CError as `measure` has them."""
        formats = choose(self.units, self.scores, effective_bits)
        bits = mean_bits(self.units, formats)
        made = spec_with_formats(self.spec, formats, _table(self.spec).block)
        return Chosen(made, self.units, formats, self.scores, bits, self.method, self.amax)


def measure(
    spec: Spec,
    checkpoint: Checkpoint,
    progress: Progress,
    *,
    ids: Tensor | None = None,
    mtp: bool = False,
    at_least: float = 0.0,
) -> Sensitivity:
    """Measure every unit in every format.

    With calibration tokens `ids` [N, L] the harm is the second-order score, without them the noise of
    the weights. The 4-bit format and the blocks are those of spec.quantization; `mtp` includes the MTP
    block. Deterministic. A budget `at_least` that no choice meets fails before the work.
    Raises N3CError: exit code 2 for a budget below the cheapest choice, 6 for a checkpoint that does
    not fit, 5 for scores that are not finite.
    """
    table = _table(spec)
    four_bit = table.format if FORMATS[table.format].blocked else DEFAULT.format
    units = find_units(spec, four_bit, table.block[0], mtp=mtp)
    require_feasible(units, at_least or 16.0)
    if ids is None:
        return Sensitivity(spec, units, noise_scores(units, checkpoint, table.block[0], progress), "weight noise")
    model = StreamedModel(spec, checkpoint)
    with KeptInputs() as kept:
        amax = calibrate(model, ids, progress, mtp=mtp, keep=kept.keep)
        scores = second_order_scores(model, units, progress, ids=ids, kept=kept, amax=amax, block_rows=table.block[0])
    return Sensitivity(spec, units, scores, "second order", amax)


def spec_with_formats(spec: Spec, formats: Mapping[str, str], block: tuple[int, int]) -> Spec:
    """Return `spec` with rules that give every unit of `formats` its format, and BF16 to all other linears."""

    def format_of(group: Group, module: str) -> str:
        return formats.get(unit_name(group.name.replace("{}", "*") if group.experts else module), "bf16")

    return spec_with_table(spec, rules_table(groups_of(spec), format_of, spec.model.pattern), block)


def _table(spec: Spec) -> Quantization:
    return spec.quantization or DEFAULT
