"""The linears of an entry point, and the graph input that holds the weight of each, for the audit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from n3c.ir import ops
from n3c.ir.formats import FORMATS
from n3c.ir.program import Call, EntryPoint, Node, Parameter, Program, Value
from n3c.ir.source import Source, Tensor, leaves
from n3c.ir.types import DType

from .bindings import BYTES
from .entry_forms import LinearForms, has_wide_products, rows_of

_UNQUANTIZED = {DType.F32: "fp32", DType.F16: "fp16", DType.BF16: "bf16"}


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear to audit."""

    name: str
    """Module name in the checkpoint."""
    requested: str
    """nvfp4, w4a16_nvfp4, fp8, bf16, fp16 or fp32."""
    weight: str
    """Engine input that holds its weight, packed if it is quantized."""
    selected: int
    """Weights (elements) that one call reads: all, or those of the chosen experts."""
    total: int
    """Weights (elements) in all."""
    shape: tuple[int, int]
    """[N, K] of one matrix."""
    rows: int
    """Rows that one matrix is applied to in a call: sequences times tokens."""
    widened: str = ""
    """The format that the graph itself dequantizes the weight to, once a call, for a matrix product; else empty."""
    by_expert: bool = False
    """Of chosen experts: whether those who chose the same come one after the other."""

    @property
    def expected(self) -> str:
        """The format in which kernels must read the weight for the graph to be realised."""
        return self.widened or self.requested


def linears_of(program: Program, entry: EntryPoint, dims: Mapping[str, int], forms: LinearForms) -> tuple[Linear, ...]:
    """Return the linears of an entry point in the order of its calls; merged ones once for each part.

    A stack of experts is one linear, named with `*` for the expert, as in
    `backbone.layers.1.mixer.experts.*.up_proj`.
    """
    wide = has_wide_products(program)
    return tuple(
        linear
        for call in entry.calls
        for node in program.functions[call.function].nodes
        for weight in node.weights
        for linear in _linears(program, call, node, weight, dims, wide, forms)
    )


def _linears(
    program: Program,
    call: Call,
    node: Node,
    weight: Value,
    dims: Mapping[str, int],
    wide: bool,
    forms: LinearForms,
) -> Iterator[Linear]:
    parameter = program.bound(call, weight.stored[0])
    total = selected = weight.type.elements
    *_, n, k = weight.type.static_dims
    if node.op is ops.expert_linear:
        chosen = node["indices"].type.bind(dims).elements
        selected = chosen * prod(weight.type.static_dims[1:])
    product = forms.is_product(node)
    for name in _modules(parameter.source):
        yield Linear(
            name,
            requested=_format(parameter),
            weight=parameter.name + (BYTES if not product and weight.stored[0] in forms.read_as_bytes(node) else ""),
            selected=selected,
            total=total,
            shape=(n, k),
            rows=rows_of(node, dims),
            widened=_widened(parameter, wide) if product else "",
            by_expert=node.op is ops.expert_linear and forms.of(node) == "by_expert",
        )


def _widened(parameter: Parameter, wide: bool) -> str:
    """Return to what a matrix product has the weight dequantized, where it does not take the stored type."""
    if parameter.type.dtype in _UNQUANTIZED and not (wide and parameter.type.dtype is DType.BF16):
        return ""
    taken = parameter.type.dtype is not DType.I8 and FORMATS[parameter.format].input_divisor is not None
    return "" if taken else "fp32" if wide else "bf16"


def _format(parameter: Parameter) -> str:
    return _UNQUANTIZED.get(parameter.type.dtype, parameter.format)


def _modules(source: Source) -> Iterator[str]:
    """Yield the modules whose weights `source` holds; `*` stands for every expert."""
    for leaf in leaves(source):
        yield (leaf.name if isinstance(leaf, Tensor) else leaf.pattern).removesuffix(".weight")
