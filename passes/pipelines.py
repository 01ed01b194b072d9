"""The passes in the order in which they run, each with the reason for its place.

`lower` makes the program of a spec. Training runs no pass: generated code carries its own numerics. What is
deployed goes through the passes of `SERVING`, in this order, and those of extensions that the spec names
(`serving.passes`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.ir.extensions import entries, guarded, loaded
from n3c.ir.formats import FORMATS
from n3c.ir.types import DType
from n3c.specs.rules import format_rules
from n3c.specs.schema import PASS, Spec

from .base import Pass
from .cleanup import Cleanup
from .fuse_moe import FuseMoe
from .pack import CODES, Pack
from .plan_state import PlanState
from .quantize import Quantize
from .quantize_activations import ROUNDED, QuantizeActivations
from .widen import Widen

STATE_DTYPES = {"fp32": DType.F32, "fp16": DType.F16, "bf16": DType.BF16, "fp8": DType.F8E4M3}


@dataclass(frozen=True, slots=True)
class Stage:
    """A pass, and how it gets its options."""

    pass_: type[Pass]
    make: Callable[[Spec, Collection[DType]], Pass]
    """Makes the pass of a spec and the types that the target lacks."""
    after: str = ""
    """The name of the pass behind which one of an extension runs; n3c's own stand in their order in `SERVING`."""

    @property
    def name(self) -> str:
        """The name of the pass."""
        return self.pass_.name


SERVING: tuple[Stage, ...] = (
    # first: formats decide what may merge and how experts are packed
    Stage(Quantize, lambda spec, _: quantize_pass(spec)),
    # makes the entry points, and gives functions their states
    Stage(PlanState, lambda spec, _: _plan_state(spec)),
    # after plan_state: the dispatch of experts depends on the entry point
    Stage(FuseMoe, lambda *_: FuseMoe()),
    # after fuse_moe, which makes the linears; before pack, behind which no kernel takes the stored type
    Stage(QuantizeActivations, lambda spec, lacking: quantize_activations_pass(spec, lacking)),
    # after fuse_moe, which tells the codes of experts by their type
    Stage(Pack, lambda _, lacking: Pack(frozenset(CODES) & frozenset(lacking))),
    # last: merged weights leave their parts behind, and prefill needs only the caches of multi-token prediction
    Stage(Cleanup, lambda *_: Cleanup()),
)
"""The passes of what is deployed, in order."""

STAGES = ("lower", *(stage.name for stage in SERVING))
"""Names of the stages of the serving pipeline, in order."""

ELSEWHERE: tuple[type[Pass], ...] = (Widen,)
"""Passes in no pipeline, without options: what runs the float32 form of a program applies them to a copy."""
DUMPED = (*STAGES, *(pass_.name for pass_ in ELSEWHERE))
"""Names of what `serve` calls `after` with, in order, where a spec asks for no pass of an extension."""


def serving_passes(spec: Spec, lacking: Collection[DType] = ()) -> list[Pass]:
    """Return the passes of serving with the options of `spec`, for a target that lacks the types `lacking`.

    N3CError for a pass that no installed extension has (E0522, exit code 3), and for a broken extension (E0521).
    """
    stages = list(SERVING)
    for index, name in enumerate(spec.serving.passes or ()):
        added = added_stages()
        if name not in added:
            known = f"installed: {', '.join(added)}" if added else "no extension with passes is installed"
            span = spec.span(f"serving.passes.{index}") or spec.span("serving.passes")
            raise N3CError(Diagnostic("E0522", f"no extension has a pass `{name}`", span, help=known), ExitCode.SPEC)
        place = [stage.name for stage in stages].index(added[name].after)
        while place + 1 < len(stages) and stages[place + 1].after == added[name].after:
            place += 1  # of several behind the same pass, in the order of the spec
        stages.insert(place + 1, added[name])
    return [stage.make(spec, lacking) for stage in stages]


@cache
def added_stages() -> dict[str, Stage]:
    """Return the passes of installed extensions: name → stage; N3CError (E0521, exit code 4) where one is broken."""
    found: dict[str, Stage] = {}
    faults: list[Diagnostic] = []
    for entry in entries("n3c.passes"):
        try:
            stage = loaded(entry, Stage)
        except N3CError as error:
            faults += error.diagnostics
            continue
        if re.fullmatch(PASS, stage.name) is None:
            faults.append(entry.fault(f"{stage.name!r} cannot be the name of a pass"))
        elif stage.name in DUMPED or stage.name in found:
            faults.append(entry.fault(f"there is a pass `{stage.name}` already"))
        elif stage.after not in STAGES[1:]:
            faults.append(entry.fault(f"it runs after `{stage.after}`, which is none of {', '.join(STAGES[1:])}"))
        found[stage.name] = Stage(stage.pass_, guarded(entry, stage.make), stage.after)
    if faults:
        raise N3CError(faults, ExitCode.TARGET)
    return found


def quantize_pass(spec: Spec) -> Quantize:
    """Return the pass for the spec's [quantization]; without the table everything stays BF16."""
    return Quantize(format_rules(spec, "quantization"))


def quantize_activations_pass(spec: Spec, lacking: Collection[DType] = ()) -> QuantizeActivations:
    """Return the pass for `serving.activations`; a target rounds to the formats of whose types it lacks none."""
    if spec.serving.activations == "weight_only":
        return QuantizeActivations(frozenset())
    able = [name for name in ROUNDED if not {part.dtype for part in FORMATS[name].parts} & set(lacking)]
    return QuantizeActivations(frozenset(able))


def _plan_state(spec: Spec) -> PlanState:
    serving = spec.serving
    return PlanState(
        max_seq_len=serving.max_seq_len,
        kv_dtype=STATE_DTYPES[serving.kv_cache_dtype],
        ssm_dtype=STATE_DTYPES[serving.ssm_state_dtype],
        conv_dtype=STATE_DTYPES[serving.conv_state_dtype],
        prefill_chunk=serving.prefill_chunk,
        draft_tokens=serving.draft_tokens,
    )
