"""The passes in the order in which they run, each with the reason for its place.

`lower` makes the program of a spec. Training runs no pass: generated code carries its own numerics. What is
deployed goes through the passes of `SERVING`, in this order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from n3c.ir.formats import FORMATS
from n3c.ir.types import DType
from n3c.specs.rules import format_rules
from n3c.specs.schema import Spec

from .base import Pass
from .cleanup import Cleanup
from .fuse_moe import FuseMoe
from .pack import CODES, Pack
from .plan_state import PlanState
from .quantize import Quantize
from .quantize_activations import ROUNDED, QuantizeActivations
from .widen import Widen

STATE_DTYPES = {"fp32": DType.F32, "fp16": DType.F16, "bf16": DType.BF16, "fp8": DType.F8E4M3}

SERVING: Mapping[type[Pass], Callable[[Spec, Collection[DType]], Pass]] = {
    # first: formats decide what may merge and how experts are packed
    Quantize: lambda spec, _: quantize_pass(spec),
    # makes the entry points, and gives functions their states
    PlanState: lambda spec, _: _plan_state(spec),
    # after plan_state: the dispatch of experts depends on the entry point
    FuseMoe: lambda *_: FuseMoe(),
    # after fuse_moe, which makes the linears; before pack, behind which no kernel takes the stored type
    QuantizeActivations: lambda spec, lacking: quantize_activations_pass(spec, lacking),
    # after fuse_moe, which tells the codes of experts by their type
    Pack: lambda _, lacking: Pack(frozenset(CODES) & frozenset(lacking)),
    # last: merged weights leave their parts behind, and prefill needs only the caches of multi-token prediction
    Cleanup: lambda *_: Cleanup(),
}
"""Pass → how it is made of a spec and the types that the target lacks."""

STAGES = ("lower", *(pass_.name for pass_ in SERVING))
"""Names of the stages of the serving pipeline, in order."""

ELSEWHERE: tuple[type[Pass], ...] = (Widen,)
"""Passes in no pipeline, without options: what runs the float32 form of a program applies them to a copy."""
DUMPED = (*STAGES, *(pass_.name for pass_ in ELSEWHERE))
"""Names of what `serve` calls `after` with, in order."""


def serving_passes(spec: Spec, lacking: Collection[DType] = ()) -> list[Pass]:
    """Return the passes of serving with the options of `spec`, for a target that lacks the types `lacking`."""
    return [make(spec, lacking) for make in SERVING.values()]


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
