"""Compile every kernel as its launch function would launch it, for GPUs that need not be there; a program of its own.

    python compile_offline.py [CAPABILITY …] [--only NAME …] [--once] [--disassemble FOLDER]

Launches on meta tensors are caught, and their kernels compiled to cubins by Triton and the ptxas of its wheel. Prints
a JSON list of what became of each: registers, instructions that spill them, bytes of shared memory, and how wide the
loads from global memory are. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language import target_info
from triton.runtime.jit import JITFunction

from n3c.runtime.engines.torch.activations import Activation
from n3c.runtime.engines.torch.kernels import attention, experts, gated_norm, linear, mamba_step, norm, rounding, router
from n3c.runtime.engines.torch.packed import Format, PackedWeight

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
FORMATS: tuple[Format, ...] = ("bf16", "fp8", "nvfp4")
TOOLS = Path(triton.__path__[0]) / "backends/nvidia/bin"


class Launch:
    """A kernel with the arguments that it was launched with."""

    def __init__(self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.kernel = kernel
        self.options: dict[str, Any] = {k: options[k] for k in ("num_warps", "num_stages") if k in options}
        self.signature: dict[str, str] = {}
        self.constants: dict[tuple[int, ...], Any] = {}
        self.aligned: dict[tuple[int, ...], list[list[Any]]] = {}
        for i, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
            kind = TYPES[value.dtype] if isinstance(value, Tensor) else "fp32" if isinstance(value, float) else "i32"
            if parameter.is_constexpr or (type(value) is int and value == 1):
                kind = "constexpr"
                self.constants[i,] = value
            elif isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):  # as Triton specializes
                self.aligned[i,] = [["tt.divisibility", 16]]
            self.signature[parameter.name] = kind

    def compiled(self, capability: int) -> Any:
        source = ASTSource(self.kernel, self.signature, self.constants, self.aligned)
        target = GPUTarget("cuda", capability, 32)
        driver = Mock()  # what kernels ask for the GPU that they are compiled for
        driver.active.get_current_target.return_value = target
        with patch.object(target_info, "driver", driver):
            return triton.compile(source, target=target, options=self.options)


def catch_launches(call: Callable[[], object]) -> list[Launch]:
    """Return what `call` launches."""
    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: object, warmup: bool, **options: Any) -> None:
        launches.append(Launch(self, args, options))

    before, JITFunction.run = JITFunction.run, run
    try:
        call()
    finally:
        JITFunction.run = before
    return launches


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weight(format: Format, *shape: int) -> PackedWeight:
    scale = tensor(*shape[:-2], dtype=torch.float32)
    if format == "bf16":
        return PackedWeight(format, tensor(*shape), None, None, shape)
    if format == "fp8":
        return PackedWeight(format, tensor(*shape, dtype=torch.uint8), None, scale, shape)
    data = tensor(*shape[:-1], shape[-1] // 2, dtype=torch.uint8)
    return PackedWeight(format, data, tensor(*shape[:-1], shape[-1] // 16, dtype=torch.uint8), scale, shape)


def activation(format: Format) -> Activation:
    return Activation(format, tensor(dtype=torch.float32))


def experts_call(
    format: Format, tokens: int, E: int, K: int, L: int, inner: int, rounds: bool = False
) -> Callable[[], object]:
    x, chosen, weights = tensor(tokens, L), tensor(tokens, K, dtype=torch.int64), tensor(tokens, K, dtype=torch.float32)
    up, down = weight(format, E, inner, L), weight(format, E, L, inner)
    read = activation(format) if rounds else None
    return lambda: experts.routed_experts(x, chosen, weights, up, down, (read, read))


def linear_call(format: Format, rows: int, N: int, K: int, rounds: bool = False) -> Callable[[], object]:
    x, w = tensor(rows, K), weight(format, N, K)
    return lambda: linear.many_rows_linear(x, w, activation=activation(format) if rounds else None)


def mamba_call(tokens: int, batch: int, H: int, counted: bool) -> Callable[[], object]:
    """Nano's or, with 128 heads, Super's."""
    inner, X, f32 = H * 64, H * 64 + 2 * 8 * 128, torch.float32
    operands = (
        tensor(batch, tokens, inner + X + H), tensor(batch, 3, X), tensor(batch, H, 64, 128, dtype=f32),
        tensor(X, 4), tensor(X), tensor(H, dtype=f32), tensor(H, dtype=f32), tensor(H, dtype=f32),
    )  # fmt: skip
    counts = tensor(batch, dtype=torch.int64) if counted else None
    return lambda: mamba_step.mamba2_step(*operands, groups=8, counts=counts)


def attention_call(tokens: int, batch: int, capacity: int) -> Callable[[], object]:
    q, lengths = tensor(batch, 32, tokens, 128), tensor(batch, dtype=torch.int64)
    keys, values = tensor(batch, 2, capacity, 128), tensor(batch, 2, capacity, 128)
    return lambda: attention.cached_attention(q, keys, values, lengths)


def calls() -> dict[str, Callable[[], object]]:
    """Return what is compiled: Nano's and Super's sizes, rows from decoding to prefill."""
    f32 = torch.float32
    found: dict[str, Callable[[], object]] = {}
    for stored in FORMATS:
        for rows in (1, 4, 64, 1024):
            found[f"linear.{stored}.{rows}"] = linear_call(stored, rows, 10304, 2688)
        found[f"linear.{stored}.1.small"] = linear_call(stored, 1, 2688, 4096)
        for tokens in (1, 8, 512):
            found[f"experts.{stored}.{tokens}"] = experts_call(stored, tokens, 128, 6, 2688, 1856)
        if stored == "nvfp4":
            found["linear.coded.1"] = linear_call(stored, 1, 10304, 2688, rounds=True)
            found["linear.coded.1.small"] = linear_call(stored, 1, 2688, 4096, rounds=True)
            found["experts.coded.1"] = experts_call(stored, 1, 128, 6, 2688, 1856, rounds=True)
            found["experts.coded.8"] = experts_call(stored, 8, 128, 6, 2688, 1856, rounds=True)
        found[f"experts.{stored}.8192"] = experts_call(stored, 8192, 512, 22, 1024, 2688)
    for tokens, counted in ((1, False), (4, True), (8, True)):
        found[f"mamba.{tokens}"] = mamba_call(tokens, 1, 64, counted)
    for tokens in (1, 4, 8):
        found[f"attention.{tokens}"] = attention_call(tokens, 1, 32768)
    found["norm"] = lambda: norm.rms_norm(tensor(8, 2688), tensor(2688), 1e-5)
    found["norm.add"] = lambda: norm.add_rms_norm(tensor(8, 4096), tensor(8, 4096), tensor(4096), 1e-5)
    found["gated_norm"] = lambda: gated_norm.gated_rms_norm(
        tensor(8, 4096, dtype=f32), tensor(8, 10304)[:, :4096], tensor(4096), 8, 1e-5
    )
    for stored in ("fp8", "nvfp4"):
        found[f"rounding.{stored}"] = partial(rounding.rounded, activation(stored), tensor(8, 2688))
    found["router"] = lambda: router.route(tensor(8, 512, dtype=f32), tensor(512, dtype=f32), 22, 5.0)
    return found


def disassembled(cubin: bytes) -> tuple[str, str]:
    """Return the machine code of a cubin as text, and what ptxas noted of its resources."""

    def output(tool: str, option: str) -> str:
        command = [str(TOOLS / tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return output("nvdisasm", "-c"), output("cuobjdump", "-res-usage")


def report(name: str, launch: Launch, capability: int, folder: Path | None) -> dict[str, Any]:
    """Return the figures of one compiled kernel."""
    kernel = launch.compiled(capability)
    code, usage = disassembled(kernel.asm["cubin"])
    if folder is not None:
        stem = folder / f"{name}.{launch.kernel.__name__}.sm{capability}"
        stem.with_suffix(stem.suffix + ".sass").write_text(code)
        stem.with_suffix(stem.suffix + ".ttgir").write_text(kernel.asm["ttgir"])
    registers = re.findall(r"REG:(\d+)", usage)
    mnemonics = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?\s*([A-Z0-9_.]+)", code)
    waits = mnemonics.index("ACQBULK") if "ACQBULK" in mnemonics else 0
    loads = Counter(m for m in mnemonics if m.startswith(("LDG", "LDGSTS")))
    return {
        "call": name,
        "kernel": launch.kernel.__name__,
        "capability": capability,
        "registers": int(registers[0]),
        "spills": sum(m.startswith(("LDL", "STL")) for m in mnemonics),
        "shared": kernel.metadata.shared,
        "instructions": len(mnemonics),
        "loads": dict(loads),
        "waits": waits > 0,
        "starts_next": "PREEXIT" in mnemonics,
        "loads_before_waiting": sum(m.startswith("LDG") for m in mnemonics[:waits]),
        **launch.options,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capabilities", nargs="*", type=int, default=[90])
    parser.add_argument("--only", nargs="*", default=[""], help="calls that begin with one of these")
    parser.add_argument("--once", action="store_true", help="each kernel as it is launched first")
    parser.add_argument("--disassemble", type=Path, help="folder for machine code")
    options = parser.parse_args()
    if options.disassemble:
        options.disassemble.mkdir(parents=True, exist_ok=True)
    called = {name: call for name, call in calls().items() if name.startswith(tuple(options.only))}
    reports: list[dict[str, Any]] = []
    for capability in options.capabilities:
        wide = Mock(return_value=capability in (90, 100))
        with patch.object(linear, "has_wide_products", wide), patch.object(attention, "has_wide_products", wide):
            launches = [(name, launch) for name, call in called.items() for launch in catch_launches(call)]
        if options.once:
            launches = list({launch.kernel: (name, launch) for name, launch in reversed(launches)}.values())
        reports += [report(name, launch, capability, options.disassemble) for name, launch in launches]
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
