"""TensorRT Edge-LLM's `tensorrt-edgellm-export`, as a user calls it, and the ONNX file that it writes, read again.

See `reading.py` for how this is run and what it writes. Nothing is replaced; no GPU and no TensorRT are needed. Weights
are decoded as the graph itself does, by its own scales. Not decoded are W4A16_NVFP4 weights, which are packed in the
order of Marlin's kernel. The MTP draft is exported by another command.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import Tensor

from .reading import Reading, dequantized, main, tensors_of

ROOT = "_model."
KINDS_OF_SCALES = ("input_scale", "weight_scale", "weight_scale_2")
CACHE_SCALES = {"k_scale": 1, "v_scale": 2}
OPERANDS = {"up_proj": (2, 8), "down_proj": (5, 9)}
"""Of the plugin of experts: the first of codes, scales of blocks and scale of a weight; the scale of its input."""


def read(folder: Path) -> Reading:
    """Return what the exported files hold under the names of the checkpoint."""
    from tensorrt_edgellm.scripts import export

    with tempfile.TemporaryDirectory() as place:
        sys.argv = ["tensorrt-edgellm-export", str(folder), place]
        export.main()
        graph = Graph(onnx.load(Path(place) / "llm/model.onnx").graph)
        (embedding,) = load_file(Path(place) / "llm/embedding.safetensors").values()
    reading = Reading({"backbone.embeddings.weight": embedding})
    for name, tensor in tensors_of(folder).items():
        module, _, kind = name.rpartition(".")
        linear = (graph.linear(module) or graph.expert(module)) if kind == "weight" else None
        if linear is not None:
            weight, reading.values[f"{module}.input_scale"], reading.formats[module] = linear
            rows, columns = tensor.shape
            reading.values[name] = weight[:rows, : columns * (2 if tensor.dtype == torch.uint8 else 1)]
        elif kind == "weight" and graph.is_weight_only(module):
            reading.formats[module] = "W4A16_NVFP4"
        elif kind not in KINDS_OF_SCALES and (value := graph.value(module, kind)) is not None:
            reading.values[name] = value
    return reading


class Graph:
    """An exported graph: its constants, and who makes and takes each value."""

    def __init__(self, graph: Any) -> None:
        self.constants: Mapping[str, Any] = {constant.name: constant for constant in graph.initializer}
        self.nodes = list(graph.node)
        self.makers = {output: node for node in self.nodes for output in node.output}
        self.takers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for taken in node.input:
                self.takers.setdefault(taken, []).append(node)

    def constant(self, name: str) -> Tensor:
        """Return a constant; of 4-bit floats its codes [N, K/2], of 8-bit ones its values."""
        found = self.constants[name]
        if found.data_type == onnx.TensorProto.FLOAT4E2M1:
            rows, columns = found.dims
            return torch.frombuffer(bytearray(found.raw_data), dtype=torch.uint8).reshape(rows, columns // 2)
        if found.data_type == onnx.TensorProto.FLOAT8E4M3FN:
            codes = torch.frombuffer(bytearray(found.raw_data), dtype=torch.uint8)
            return codes.view(torch.float8_e4m3fn).float().reshape(tuple(found.dims))
        return torch.from_numpy(numpy_helper.to_array(found).copy())

    def value(self, module: str, kind: str) -> Tensor | None:
        """Return what the graph holds for a tensor that is not quantized; None where it has no such constant."""
        if kind == "A_log":
            (step,) = (node for node in self.takers[f"{ROOT}{module}.D"] if node.op_type == "update_ssm_state")
            return (-self.constant(step.input[1])).log()
        if kind in CACHE_SCALES and f"{ROOT}{module}.weight" in self.constants:
            # that of the one attention block that these models have
            (scales,) = (a.floats for node in self.nodes for a in node.attribute if a.name == "qkv_scales")
            return torch.tensor(scales[CACHE_SCALES[kind]])
        kind = {"e_score_correction_bias": "_e_score_correction_bias_fp32"}.get(kind, kind)
        module = module.removesuffix(".gate") if kind.startswith("_e_score") else module
        name = f"{ROOT}{module}.{kind}"
        return self.constant(name) if name in self.constants else None

    def linear(self, module: str) -> tuple[Tensor, Tensor, str] | None:
        """Return weight, scale of the input and ModelOpt's algorithm of a quantized linear; None for another one."""
        name = f"{ROOT}{module}.weight"
        dequantize = next((node for node in self.takers.get(name, ()) if node.op_type == "DequantizeLinear"), None)
        if dequantize is None:
            return None
        codes = self.constant(name)
        multiply = self.taker(dequantize, "Gemm")
        rounded = self.makers[self.makers[multiply.input[0]].input[0]]
        scale = self.constant(rounded.input[1])
        if rounded.op_type == "QuantizeLinear":
            return codes * self.constant(dequantize.input[1]).float(), scale, "FP8"
        blocks = self.makers[dequantize.input[1]]
        weight = dequantized(codes, self.constant(blocks.input[0]), self.constant(blocks.input[1]))
        return weight, scale, "NVFP4"

    def taker(self, node: Any, op_type: str) -> Any:
        """Return the node of a type that takes what `node` makes, by way of a cast or not."""
        (taken,) = self.takers[node.output[0]]
        return taken if taken.op_type == op_type else self.taker(taken, op_type)

    def expert(self, module: str) -> tuple[Tensor, Tensor, str] | None:
        """Return the same of a routed expert's linear in NVFP4, whose rows and inputs may be padded."""
        plugin = self.plugin(module)
        if plugin is None or plugin.op_type != "Nvfp4MoePlugin":
            return None
        _, number, half = module.rsplit(".", 2)
        expert, first, scale = int(number), *OPERANDS[half]
        packed, tiles, alpha = (self.constant(name)[expert] for name in plugin.input[first : first + 3])
        blocks = tiles.permute(0, 3, 2, 1, 4).flatten(3).flatten(0, 2)  # tiles of 128 rows by 4 scales
        blocks = blocks[: len(packed), : packed.shape[1] // 8].contiguous().view(torch.float8_e4m3fn)
        return dequantized(packed, blocks, alpha), self.constant(plugin.input[scale])[expert], "NVFP4"

    def is_weight_only(self, module: str) -> bool:
        """Whether a linear is run by a kernel for W4A16_NVFP4."""
        plugin = self.plugin(module)
        return plugin is not None and plugin.op_type.startswith("Nvfp4A16")

    def plugin(self, module: str) -> Any:
        """Return the node that runs a linear whose weight is packed for a kernel; None for another one."""
        parent, _, of_expert = module.partition(".experts.")
        name = f"{ROOT}{parent}.fc1_qweights" if of_expert else f"{ROOT}{module}.qweight"
        return next(iter(self.takers.get(name, ())), None)


if __name__ == "__main__":
    main("0.11.0", read)
