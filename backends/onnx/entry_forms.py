"""Which form each linear of an entry point takes: what is to be computed is read from the program, then chosen.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from n3c.backends.gpus import gpus_of
from n3c.backends.kernel_work import Choice
from n3c.ir import ops
from n3c.ir.op_definition import OpDef
from n3c.ir.program import EntryPoint, Node, Program, Value
from n3c.ir.types import DType
from n3c.passes.pack import CODES

from .linear_forms import Applied, Choose, LinearForm, fastest, is_read_as_bytes, rounds


def fastest_for(program: Program, sms: Sequence[int] = ()) -> Choose:
    """Return the choice for the GPUs of these SM versions (none: 120), for those that hold the weights if any do."""
    weights = sum(parameter.type.bytes for parameter in program.parameters.values())
    gpus = gpus_of(sms or (120,))
    return fastest(*(tuple(gpu for gpu in gpus if gpu.memory > weights) or gpus))


def rows_of(node: Node, dims: Mapping[str, int]) -> int:
    """Return how many rows (sequences times tokens) a node with weights is applied to."""
    return prod(node["x"].type.bind(dims).static_dims[:2])


def bucket_rows(rows: int, top_k: int, experts: int) -> int:
    """Return the rows of an expert's bucket where `rows` tokens choose `top_k` experts each: at most `rows`.

    Twice the mean, in steps of 32: a router that loads experts evenly stays below that by far.
    """
    return min(rows, -(-2 * rows * top_k // (experts * 32)) * 32)


def has_wide_products(program: Program) -> bool:
    """Return whether products are float32 ones: where every state of the model is float32."""
    return all(state.type.dtype is DType.F32 for state in program.states.values())


class LinearForms:
    """The forms of the linears of an entry point."""

    def __init__(self, program: Program, entry: EntryPoint, dims: Mapping[str, int], choose: Choose) -> None:
        """Take the entry point, or a stage of it; `dims` gives each symbolic dim its size."""
        self._dims, self._choose = dims, choose
        self._wide = has_wide_products(program)
        name = entry.name.partition(".")[0]
        self._exact = name != "prefill"
        whole = program.entry_points.get(name, entry)  # all stages alike: what is computed must not depend on them
        functions = {call.function: program.functions[call.function] for call in whole.calls}
        self._beside_loop = any(self._overflows(node) for f in functions.values() for node in f.nodes)

    def _overflows(self, node: Node) -> bool:
        """Whether a node is experts whose buckets may overflow, into a Loop."""
        if node.op is not ops.experts:
            return False
        rows, top_k = rows_of(node, self._dims), node["indices"].type.bind(self._dims).static_dims[-1]
        return bucket_rows(rows, top_k, node["up"].type.static_dims[0]) < rows

    def is_product(self, node: Node) -> bool:
        """Return whether a node with weights is matrix products; else each is a product and a sum in one kernel."""
        return node.op is ops.experts or (node.op is ops.linear and self.of(node) == "product")

    def rounds(self, node: Node) -> bool:
        """Return whether a node with weights rounds what it reads to BF16, in whatever form."""
        if node.op is not ops.linear:
            return node.op is ops.experts and not self._wide
        return rounds(self.of(node), self._applied(node))

    def of(self, node: Node) -> LinearForm:
        """Return the form of a linear."""
        return self._choose(self._applied(node))

    def read_as_bytes(self, node: Node) -> list[Value]:
        """Return the stored values of NVFP4 weights that a node reads as bytes, decoded by tables.

        Codes of a linear that is a sum; codes and block scales of chosen experts, as neither type can be gathered.
        Experts in buckets read both as they are, too (`is_product`), and as bytes for what overflows.
        """
        weights = [weight for weight in node.weights if _is_nvfp4(weight)]
        if node.op is ops.expert_linear or self._overflows(node):
            return [value for weight in weights for value in weight.stored if value.type.dtype in CODES]
        if node.op is not ops.linear or not weights or self.of(node) != "sum":
            return []
        codes, width = weights[0].stored[0], weights[0].type.static_dims[-1]
        return [codes] if is_read_as_bytes(codes.type.dtype, width) else []

    def _applied(self, node: Node) -> Applied:
        weight = node["weight"]
        codes, rows = weight.stored[0], rows_of(node, self._dims)
        *experts, n, k = weight.type.static_dims
        blocked = _is_nvfp4(weight)
        if node.op is ops.expert_linear:
            top_k = node["indices"].type.bind(self._dims).static_dims[-1]
            choice = Choice(experts[0], top_k, rows)
            dtype = DType.I8 if blocked else codes.type.dtype
            return Applied(dtype, blocked, (n, k), rows, exact=self._exact, choice=choice)
        rounding = _made_by(node["x"], ops.quantize_activation)
        around: set[str] = set()
        if rounding is None or not blocked:  # FP4 is rounded to in kernels of its own, which a norm ends in
            x = node["x"] if rounding is None else rounding["x"]
            around = {operator for op, operator in _AROUND if _made_by(x, op) is not None}
            around.update(("QuantizeLinear",) if rounding is not None else ())
        return Applied(
            codes.type.dtype, blocked, (n, k), rows, rounding is not None, frozenset(around), self._wide,
            self._exact, self._beside_loop,
        )  # fmt: skip


_AROUND = ((ops.rms_norm, "RMSNormalization"), (ops.gated_rms_norm, "Sqrt"), (ops.relu2, "Relu"))
"""Op → an ONNX operator of its spelling, by which its cost in front of a sum is known."""


def _is_nvfp4(weight: Value) -> bool:
    """Whether a weight is stored as codes with scales of their blocks."""
    return weight.node is not None and weight.node.op is ops.dequantize_nvfp4


def _made_by(value: Value, op: OpDef) -> Node | None:
    """Return the node that makes `value` where its op is `op`."""
    return value.node if value.node is not None and value.node.op is op else None
