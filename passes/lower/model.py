"""lower: turn a spec into a program with the entry point `forward`, the model as it trains.

Layers of one kind and of equal sizes share the function that `blocks` makes; each call binds the parameters of its
layer. A layer that differs (`[[moe.layers]]`) has a variant, named by its sizes: `moe.K4.I1280`.
"""

from __future__ import annotations

from n3c.ir import ops
from n3c.ir.extensions import part
from n3c.ir.program import Call, EntryPoint, Function, Origin, Parameter, Program, Value
from n3c.ir.source import Tensor
from n3c.ir.types import DType, TensorType
from n3c.specs.block_kind import BlockKind
from n3c.specs.blocks import MOE
from n3c.specs.layer_tables import PER_LAYER, spec_of_block
from n3c.specs.schema import Spec

from .blocks import Block

IDS = TensorType(DType.I64, ("B", "S"))


def lower(spec: Spec) -> Program:
    """Return the program of `spec`: activations float32 [B, S, D], weights in their stored types."""
    return _Lowering(spec).run()


class _Lowering:
    """The program under construction: blocks are built on first use, calls are appended."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.program = Program(spec.name)
        self.entry = EntryPoint("forward", {"input_ids": IDS}, [], [])
        self.program.entry_points["forward"] = self.entry
        self.blocks: dict[str, Block] = {}
        self.x = TensorType(DType.F32, ("B", "S", spec.model.hidden_size))

    def run(self) -> Program:
        model = self.spec.model
        embedding = self.end("embedding", [Value("ids", IDS)], "model.vocab_size")
        table = embedding.parameter("weight", (model.vocab_size, model.hidden_size), "embedding")
        embedding.function.outputs = [embedding.emit(ops.embedding, embedding.function.inputs[0], table, name="x")]
        self.call("embedding", "backbone.embeddings", ["input_ids"], ["x0"])

        for i, kind in enumerate(model.pattern):
            span_path = f"model.pattern.{i}"
            self.residual(kind, f"backbone.layers.{i}", f"x{i}", f"x{i + 1}", layer=i, span_path=span_path)

        norm = self.end("norm", [Value("x", self.x)], "model.norm_eps")
        norm.function.outputs = [norm.norm(norm.function.inputs[0], "weight")]
        self.call("norm", "backbone.norm_f", [f"x{len(model.pattern)}"], ["hidden"])

        head = self.end("head", [Value("x", self.x)], "model.tie_word_embeddings")
        tied = model.tie_word_embeddings
        head.function.outputs = [
            head.linear(
                head.function.inputs[0], "weight", model.vocab_size, "embedding" if tied else "lm_head", "logits"
            )
        ]
        self.call("head", self.head_label, ["hidden"], ["logits"])
        self.entry.outputs.append("logits")
        if self.spec.mtp is not None:
            self.mtp()
        return self.program

    @property
    def head_label(self) -> str:
        return "backbone.embeddings" if self.spec.model.tie_word_embeddings else "lm_head"

    def mtp(self) -> None:
        """One set of weights applied `depth` times: each step reads the hidden states of the last one."""
        mtp = self.spec.mtp
        assert mtp is not None
        first, last = "mtp.layers.0", f"mtp.layers.{len(mtp.pattern) - 1}"
        start = self.end("mtp_input", [Value("ids", IDS), Value("hidden", self.x)], "mtp")
        ids, hidden = start.function.inputs
        following = start.emit(ops.shift_left, ids, name="following")
        width = self.spec.model.hidden_size
        table = start.parameter(
            "embeddings.weight",
            (self.spec.model.vocab_size, width),
            "embedding",
            source=lambda _: Tensor("backbone.embeddings.weight"),
        )
        e = start.emit(ops.embedding, following, table, name="e")
        e = start.norm(e, "enorm.weight", "norm", "e")
        h = start.norm(hidden, "hnorm.weight", "norm", "h")
        joined = start.emit(ops.concat, e, h, name="eh")
        start.function.outputs = [start.linear(joined, "eh_proj.weight", width, "eh_proj", "x"), following]
        end = self.end("mtp_norm", [Value("x", self.x)], "mtp")
        end.function.outputs = [end.norm(end.function.inputs[0], "final_layernorm.weight")]

        ids_name, hidden_name, base = "input_ids", "hidden", len(self.spec.model.pattern)
        for depth in range(mtp.depth):
            at = f"mtp{depth}"
            self.call("mtp_input", first, [ids_name, hidden_name], [f"{at}.x0", f"{at}.ids"], role_prefix="mtp.")
            for i, kind in enumerate(mtp.pattern):
                label, span_path = f"mtp.layers.{i}", f"mtp.pattern.{i}"
                self.residual(kind, label, f"{at}.x{i}", f"{at}.x{i + 1}", layer=base + i, span_path=span_path)
            self.call("mtp_norm", last, [f"{at}.x{len(mtp.pattern)}"], [f"{at}.hidden"], role_prefix="mtp.")
            self.call("head", self.head_label, [f"{at}.hidden"], [f"{at}.logits"])
            self.entry.outputs.append(f"{at}.logits")
            ids_name, hidden_name = f"{at}.ids", f"{at}.hidden"

    def end(self, kind: str, inputs: list[Value], span_path: str, name: str = "") -> Block:
        """Start a function, called by its kind unless `name` is given."""
        name = name or kind
        function = Function(name, kind, inputs, [], origin=Origin(self.spec.span(span_path)))
        self.program.functions[name] = function
        self.blocks[name] = Block(function, self.spec.model.norm_eps)
        return self.blocks[name]

    def residual(self, kind: BlockKind, label: str, x: str, y: str, *, layer: int, span_path: str) -> None:
        """Call the residual block x + mixer(norm(x)) of `kind`; the function of its sizes is built on first use."""
        spec = spec_of_block(self.spec, layer)
        name = variant_name(kind, self.spec, spec)
        if name not in self.blocks:
            block = self.end(kind.name, [Value("x", self.x)], span_path, name)
            block.kind = kind
            inner = part(kind.lowering)(block, spec, block.function.inputs[0])
            block.function.outputs = [block.emit(ops.add, block.function.inputs[0], inner, name="out")]
        prefix = "mtp." if label.startswith("mtp.") else ""
        self.call(name, label, [x], [y], layer=layer, role_prefix=prefix, span_path=span_path)

    def call(
        self,
        name: str,
        label: str,
        inputs: list[str],
        outputs: list[str],
        *,
        layer: int | None = None,
        role_prefix: str = "",
        span_path: str | None = None,
    ) -> None:
        """Append a call and file the parameters that it binds under their names in the checkpoint."""
        block = self.blocks[name]
        origin = Origin(self.spec.span(span_path)) if span_path else block.function.origin
        bound: list[str] = []
        for formal, declared in block.declarations.items():
            source = declared.source(label)
            shared = isinstance(source, Tensor) and source.name in self.program.parameters
            actual = source.name if shared and isinstance(source, Tensor) else f"{label}.{formal}"
            if actual not in self.program.parameters:
                role = declared.role if declared.role in ("embedding", "lm_head") else role_prefix + declared.role
                self.program.parameters[actual] = Parameter(
                    actual, declared.type, role, source, layer, buffer=declared.buffer, origin=origin
                )
            bound.append(actual)
        self.entry.calls.append(Call(name, label, inputs, outputs, bound, layer=layer, origin=origin))


def variant_name(kind: BlockKind, usual: Spec, of_layer: Spec) -> str:
    """Return the name of a function: that of its kind, with the sizes in which its layer differs from its table."""
    usual_table, table = usual.table(kind), of_layer.table(kind)
    sizes = [
        f"{letter}{getattr(table, key)}"
        for letter, key in zip("KIU", PER_LAYER, strict=True)
        if kind is MOE and getattr(table, key) != getattr(usual_table, key)
    ]
    return ".".join([kind.name, *sizes])
