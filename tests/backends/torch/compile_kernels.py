"""Compile the kernels of a generated package: `compile_kernels.py PACKAGE CAPABILITY`, without TRITON_INTERPRET."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

TYPES = {
    "*bf16": "x y z B C dy dx dz dout out before after dBC h a da dh rows logits m v g",
    "*fp32": "A D dt_bias first last dlast dfirst ddt dD weight bias sums losses dweight factor",
    "*i32": "documents ends",
    "*i64": "position targets",
    "*i16": "p rest",
    "fp32": "eps rate beta1 beta2 kept correction1 correction2",
}
"""Of arguments, by their names; dt is bfloat16, and all others are sizes and strides."""


def compile_kernel(kernel: Any, capability: int, constants: dict[str, Any], options: dict[str, int]) -> None:
    kinds = {name: kind for kind, names in TYPES.items() for name in names.split()} | {"dt": "*bf16"}
    if constants.get("PRECISION") == "tf32x3":
        kinds = {name: kind.replace("bf16", "fp32") for name, kind in kinds.items()}
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith(("*", "i32"))
    }
    triton, compiler = importlib.import_module("triton"), importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    source = compiler.ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=target, options=options)
    assert ".entry" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 99 << 10  # what a program may have on SM 120, the least
    print(kernel.__name__)


def compile_all(package: str, capability: int) -> None:
    names = ("activation", "adamw", "convolution", "cross_entropy", "experts", "grouped", "norm", "ssd")
    activation, adamw, convolution, cross_entropy, experts, grouped, norm, ssd = (
        importlib.import_module(f"{package}.kernels.{name}") for name in names
    )

    def build(kernel: Any, constants: dict[str, Any], **options: int) -> None:
        compile_kernel(kernel, capability, constants, options)

    build(activation.square_forward, {"BLOCK": activation.BLOCK})
    build(activation.square_backward, {"BLOCK": activation.BLOCK})
    build(adamw.adamw_update, {"BLOCK": adamw.BLOCK, "SPLIT": True})
    build(adamw.adamw_update, {"BLOCK": adamw.BLOCK, "SPLIT": False})
    tile = {"W": 4, "BLOCK_T": convolution.BLOCK_T, "BLOCK_X": convolution.BLOCK_X, "BIAS": True, "DOCUMENTS": True}
    build(convolution.convolution_forward, tile)
    build(convolution.convolution_backward, tile, num_warps=8)
    build(cross_entropy.row_losses, {"BLOCK": cross_entropy.BLOCK, "DIFFERENTIATE": True}, num_warps=8)
    build(experts.activation_forward, experts.tile_of(1856))
    build(experts.activation_backward, experts.tile_of(1856))
    build(experts.sum_rows, {"K": 6, "WIDTH": 2688, "BLOCK": 1024})
    tile = {"ROWS": grouped.ROWS, "COLUMNS": grouped.COLUMNS, "DEPTH": grouped.DEPTH, "PRECISION": "tf32x3"}
    build(grouped.grouped_rows, {**tile, "EXPERTS": 128, "BLOCK_E": 128})
    build(grouped.grouped_weights, tile)
    for width, gated in ((512, True), (2688, False)):
        tile = norm.tile_of(width)
        warps = tile.pop("num_warps")
        build(norm.norm_forward, {**tile, "GATED": gated}, num_warps=warps)
        build(norm.norm_backward, {**tile, "GATED": gated}, num_warps=warps)
    for documents, q, precision in ((False, 64, "ieee"), (True, 64, "ieee"), (False, 16, "tf32x3")):
        common = {"P": 64, "N": 128, "Q": q, "BLOCK_P": 64, "BLOCK_N": 128, "PRECISION": precision, "SOFTPLUS": True}
        common |= {"DOCUMENTS": documents} | ({} if documents else {"documents": None})
        absent = {"FIRST": False, "first": None}
        build(ssd.scan_forward, {**common, **absent, "SKIP": True, "SAVE": True}, **ssd.FORWARD)
        build(ssd.state_backward, {**common, "DLAST": False, "dlast": None}, **ssd.STATE_BACKWARD)
        build(ssd.scan_backward, {**common, "SKIP": True}, **ssd.BACKWARD)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    sys.path.insert(0, str(folder.parent))
    compile_all(folder.name, int(sys.argv[2]))
