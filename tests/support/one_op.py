"""One op as a program, with random values for what it reads."""

from __future__ import annotations

import torch
from torch import Tensor

from n3c.ir import ops
from n3c.ir.op_definition import Attribute, OpDef
from n3c.ir.program import Call, EntryPoint, Function, Origin, Parameter, Program, State, Value
from n3c.ir.rewrite import Builder
from n3c.ir.source import Tensor as Source
from n3c.ir.types import DType, TensorType
from n3c.ir.verify import verify

F32, BF16, F16, I64 = DType.F32, DType.BF16, DType.F16, DType.I64
STORED = {F32: torch.float32, BF16: torch.bfloat16, F16: torch.float16, DType.F8E4M3: torch.float8_e4m3fn}


class OneOp:
    """A program that applies one op (behind dequantization, if weights are quantized), and values for it."""

    def __init__(self, seed: int = 0, format_: str = "bf16") -> None:
        self.format = format_
        self.generator = torch.Generator().manual_seed(seed)
        self.function = Function("f", "test", [], [])
        self.build = Builder(self.function, Origin())
        self.values: dict[str, Tensor] = {}

    def value(self, name: str, dtype: DType, tensor: Tensor, dims: tuple[int, ...] | None = None) -> Value:
        self.values[name] = tensor
        return Value(name, TensorType(dtype, dims or tuple(tensor.shape)))

    def normal(self, *dims: int, dtype: DType = F32) -> Tensor:
        return torch.randn(dims, generator=self.generator).to(STORED[dtype])

    def input(self, name: str, *dims: int) -> Value:
        value = self.value(name, F32, self.normal(*dims))
        self.function.inputs.append(value)
        return value

    def integers(self, name: str, tensor: Tensor) -> Value:
        value = self.value(name, I64, tensor)
        self.function.inputs.append(value)
        return value

    def weight(self, name: str, *dims: int, dtype: DType = F32) -> Value:
        value = self.value(name, dtype, self.normal(*dims, dtype=dtype))
        self.function.parameters.append(value)
        return value

    def state(self, name: str, *dims: int, dtype: DType = F32) -> Value:
        value = self.value(name, dtype, self.normal(*dims, dtype=dtype))
        self.function.states.append(value)
        return value

    def quantized(self, form: str, *dims: int) -> Value:
        """A weight of that form: fp8, nvfp4, packed (nvfp4 as bytes), or the name of a dtype."""
        if form in ("fp8", "nvfp4", "packed"):
            *outer, k = dims
            scales = self.value("scale", F32, torch.rand(dims[:-2], generator=self.generator) + 0.5)
            if form == "fp8":
                codes = self.value("codes", DType.F8E4M3, self.normal(*dims).to(torch.float8_e4m3fn))
                self.function.parameters += [codes, scales]
                return self.build.emit(ops.dequantize_fp8, codes, scales, name="w")
            packed = torch.randint(0, 256, (*outer, k // 2), generator=self.generator, dtype=torch.uint8)
            codes = (
                self.value("codes", DType.I8, packed.view(torch.int8).unflatten(-1, (-1, 8)))
                if form == "packed"
                else self.value("codes", DType.F4E2M1, packed, dims)
            )
            blocks = self.normal(*outer, k // 16).abs().to(torch.float8_e4m3fn)
            block_scales = self.value("block_scale", DType.F8E4M3, blocks)
            self.function.parameters += [codes, block_scales, scales]
            return self.build.emit(ops.dequantize_nvfp4, codes, block_scales, scales, name="w")
        return self.weight("w", *dims, dtype=DType(form))

    def apply(self, op: OpDef, *operands: Value | None, **attributes: Attribute) -> Program:
        names = [f"r{i}" for i in range(len(op.infer([v.type if v else None for v in operands], attributes)))]
        results = self.build.emit_many(op, *operands, names=names, **attributes)
        kept = len(results) - len(self.function.states)
        self.function.outputs, self.function.next_states = results[:kept], results[kept:]
        return self.program()

    def program(self) -> Program:
        program = Program("one")
        f = program.functions["f"] = self.function
        for p in f.parameters:
            program.parameters[p.name] = Parameter(p.name, p.type, "test", Source(p.name), format=self.format)
        for s in f.states:
            program.states[s.name] = State(s.name, s.type, "test", 0)
        outputs = [f"y{i}" for i in range(len(f.outputs))]
        call = Call("f", "at", [v.name for v in f.inputs], outputs, list(program.parameters), list(program.states))
        program.entry_points["run"] = EntryPoint("run", {v.name: v.type for v in f.inputs}, [call], outputs)
        verify(program)
        return program
