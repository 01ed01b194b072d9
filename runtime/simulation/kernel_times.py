"""The time of entry points on a GPU by their ops: a kernel each, by the model of time of the audits.

`n3c.backends.kernel_time` says what bytes, instructions and products take on a card. The audit asks it for the kernels
of plans; a spec alone has ops, each a kernel that reads its weights and states once. Instructions of weight-only
products were fitted to kernels of the PyTorch engine that were measured on an H100, and so were the shares of the scan
and of experts over many rows (docs/hardware.md); docs/capacity.md compares whole steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from n3c.backends.gpus import Gpu
from n3c.backends.kernel_time import LAUNCH, MEMORY_SHARE, PRODUCT_SHARE, duration, parts_of
from n3c.backends.kernel_work import Work
from n3c.ir import ops
from n3c.ir.costs import distinct_experts, node_flops
from n3c.ir.program import Call, Function, Node, Program, Value
from n3c.ir.types import DType, TensorType
from n3c.runtime.engines.torch.few_rows import FEW_ROWS

NO_KERNEL = frozenset({*ops.DEQUANTIZE, ops.split, ops.concat, ops.expand_experts, ops.shift_left, ops.last_token})
"""Ops that a neighbour does on the way."""
DECODED = {DType.F4E2M1: 6.0, DType.F8E4M3: 3.8}
"""Type of stored weights → instructions to read and decode one; others 1.3. Of linears on an H100."""
READ = 1.3
FURTHER_ROW = 0.36
"""Instructions of a weight for each row after the first."""
EXPERT_SHARE = 0.19
"""Of the tensor cores' peak, that experts over many rows reach: 187 of 989 TFLOP/s on an H100."""
SCAN_SHARE = 0.033
"""Likewise of the scan: 8,192 tokens of 64 heads in 0.66 ms there."""
DRAW = 50e-6 / 131_072
"""Seconds of the host for each logit of a token that is drawn greedily (docs/benchmarks.md)."""
BUCKET = 256
"""Tokens to which the length that attention reads is rounded up, as engines do."""


@dataclass(slots=True)
class KernelTimes:
    """Times of the entry points of `program` on `gpu`."""

    program: Program
    gpu: Gpu
    vocab_size: int
    _found: dict[tuple[str, int, int], float] = field(default_factory=dict[tuple[str, int, int], float], init=False)
    _without: dict[tuple[str, int], float] = field(default_factory=dict[tuple[str, int], float], init=False)
    """Entry point and sequences → seconds of all kernels but those of attention."""

    def call(self, entry: str, sequences: int, context: int) -> float:
        """Return the seconds of an entry point for `sequences` that attend to `context` tokens."""
        key = (entry, sequences, -(-context // BUCKET) * BUCKET)
        if key not in self._found:
            if key[:2] not in self._without:
                self._without[key[:2]] = sum(self._seconds(*key, attention=False))
            self._found[key] = self._without[key[:2]] + sum(self._seconds(*key, attention=True))
        return self._found[key]

    def copy(self, size: int) -> float:
        """Return the seconds of a copy: read and written."""
        return LAUNCH + 2 * size / (MEMORY_SHARE * self.gpu.bandwidth)

    def draw(self) -> float:
        """Return the seconds of the host for a greedy token."""
        return DRAW * self.vocab_size

    def works(self, entry: str, sequences: int, context: int) -> Iterator[tuple[Node, int, Work]]:
        """Yield the kernels of an entry point: what they do, and in how many calls of it."""
        entry_point = self.program.entry_points[entry]
        dims = {"B": sequences, "S": entry_point.tokens, "L": context}
        calls: dict[str, list[Call]] = {}
        for call in entry_point.calls:
            calls.setdefault(call.function, []).append(call)
        for name, same in calls.items():
            function = self.program.functions[name]
            for node in function.nodes:
                if node.op not in NO_KERNEL:
                    yield node, len(same), self._work(function, same[0], node, dims)

    def _seconds(self, entry: str, sequences: int, context: int, *, attention: bool) -> Iterator[float]:
        for node, count, work in self.works(entry, sequences, context):
            if (node.op is ops.cached_attention) is attention:
                yield count * duration(parts_of(work, self.gpu))[0]

    def _work(self, function: Function, call: Call, node: Node, dims: dict[str, int]) -> Work:
        rows = _rows(node.results[0].type, dims)
        states = [value for value in node.operands if value is not None and value in function.states]
        passing = [
            value.type.bind(dims).bytes
            for value in (*node.operands, *node.results)
            if value is not None and value.node is not None and value not in node.weights and not _is_cache(value)
        ]
        if node.op is ops.write_cache:
            return Work("other", node["new"].type.bind(dims).bytes, tuple(passing))
        if node.op is ops.cached_attention:
            cache = node["k_cache"].type
            read = 2 * TensorType(cache.dtype, (dims["B"], cache.dims[1], dims["L"], cache.dims[3])).bytes
            return Work("product", read, tuple(passing), flops={DType.BF16: node_flops(node, dims["L"]) * rows})
        stored = 2 * sum(state.type.bind(dims).bytes for state in states)
        if node.op is ops.embedding:
            return Work("other", stored + node.results[0].type.bind(dims).bytes, tuple(passing))
        flops = float(node_flops(node, 0)) * rows
        if not node.weights:
            given = [v for v in node.operands if v is not None and v in function.parameters]
            stored += sum(self.program.bound(call, value).type.bytes for value in given)
            scan = (
                {DType.BF16: flops * PRODUCT_SHARE / SCAN_SHARE}
                if node.op is ops.ssd_update and rows > dims["B"]
                else {}
            )
            return Work("other", stored, tuple(passing), flops=scan)
        return self._product(call, node, rows, flops, tuple(passing))

    def _product(self, call: Call, node: Node, rows: int, flops: float, passing: tuple[int, ...]) -> Work:
        """Return the work of a linear, or of the experts that `rows` tokens choose."""
        share = 1.0
        routed = node.op in (ops.expert_linear, ops.experts)
        if routed:
            experts = node.weights[0].type.static_dims[0]
            share = distinct_experts(experts, _last(node["indices"].type), rows) / experts
        stored = instructions = 0.0
        dtype = DType.BF16
        for weight in node.weights:
            parts = [self.program.bound(call, value) for value in weight.stored]
            dtype = DType.BF16 if node.op is ops.expert_linear else parts[0].type.dtype  # chosen ones are decoded
            elements = share * weight.type.elements
            stored += share * sum(part.type.bytes for part in parts)
            meets = max(1.0, flops / len(node.weights) / 2 / elements)
            instructions += elements * (DECODED.get(dtype, READ) + FURTHER_ROW * (meets - 1))
        if rows <= FEW_ROWS:
            return Work("sum", round(stored), passing, instructions=instructions)
        slower = PRODUCT_SHARE / EXPERT_SHARE if routed else 1.0
        return Work("product", round(stored), passing, flops={dtype: flops * slower})


def _rows(type_: TensorType, dims: dict[str, int]) -> int:
    """Return the tokens of a result."""
    rows = 1
    for dim in type_.dims:
        rows *= dims.get(dim, 1) if isinstance(dim, str) else 1
    return rows


def _last(type_: TensorType) -> int:
    last = type_.dims[-1]
    assert isinstance(last, int)
    return last


def _is_cache(value: Value) -> bool:
    return value.node is not None and value.node.op is ops.write_cache
