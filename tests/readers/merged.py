"""The models of vLLM and SGLang, which merge q, k and v, and a layer's experts, by names of the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .reading import SCALES_OF_WEIGHTS, Reading, dequantized


class MergedModel:
    """One of their models: of the trunk, or of multi-token prediction."""

    def __init__(self, model: Any, config: Any, experts: str, algorithm: Callable[[Any], str | None]) -> None:
        """Wrap `model`.

        `config`: the checkpoint's; `experts`: the module below `….experts` that holds merged weights, with a dot, or
        nothing; `algorithm` tells ModelOpt's name of what a module's `quant_method` runs, None: floats.
        """
        self.model = model
        self.parameters: Mapping[str, Tensor] = dict(model.named_parameters())
        self.modules: Mapping[str, Any] = dict(model.named_modules())
        query, key = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        self.widths = {"q_proj": query, "k_proj": key, "v_proj": key}
        self.experts = experts
        self.algorithm = algorithm

    def read(self, tensors: Mapping[str, Tensor], reading: Reading, *, mtp: bool) -> None:
        """Load a checkpoint into the model, in which every float is NaN before; put what it holds into `reading`."""
        for parameter in self.parameters.values():
            if parameter.is_floating_point():
                parameter.data.fill_(torch.nan)
        self.model.load_weights(iter(tensors.items()))
        for name, tensor in tensors.items():
            if name.startswith("mtp.") != mtp or name.endswith(SCALES_OF_WEIGHTS):
                continue
            place = name.replace("mtp.", "model.") if mtp else name.replace("backbone.", "model.")
            place = place.replace("embeddings", "embed_tokens")
            value = self._value(place, tensor.shape[0] if tensor.dim() else 1)
            if value is not None:
                reading.values[name] = value
            module, _, kind = place.rpartition(".")
            if kind == "weight" and (found := self._algorithm(module)):
                reading.formats[name.removesuffix(".weight")] = found

    def _value(self, name: str, rows: int) -> Tensor | None:
        """Return what is held for a tensor, float32; `rows` of it, the rest is padding. None: there is no place."""
        module, _, kind = name.rpartition(".")
        if kind == "A_log":
            a = self._held(f"{module}.A", rows)
            return None if a is None else (-a).log()
        if kind in ("k_scale", "v_scale"):
            return self._held(f"{module.rpartition('.')[0]}.attn.{kind}", rows)
        held = self._held(name, rows)
        if held is None or kind != "weight":
            return held
        scale = self._held(f"{name}_scale", rows)
        scale_2 = self._held(f"{name}_scale_2", rows)
        if scale is None:
            return held.float()
        return held.float() * scale if scale_2 is None else dequantized(held, scale, scale_2)

    def _held(self, name: str, rows: int) -> Tensor | None:
        """Return a tensor's own part of the parameter that it is merged into."""
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        expert = re.fullmatch(r"(.+\.experts)\.(\d+)", parent)
        if expert:
            half = "w13" if last == "up_proj" else "w2"
            merged = self.parameters.get(f"{expert[1]}.{self.experts}{half}_{kind}")
            return None if merged is None else merged[int(expert[2])]
        fused = f"{parent}.qkv_proj.{kind}" if last in self.widths else name
        found = self.parameters.get(fused)
        if found is None or found.dim() == 0:
            return found
        if found.dim() == 1 and kind.endswith(("_scale", "_scale_2")):
            return found.max()  # one for each merged matrix, of which readers keep the largest
        if last in self.widths:
            found = found.split(list(self.widths.values()))[list(self.widths).index(last)]
        return found[:rows]

    def _algorithm(self, name: str) -> str | None:
        """Return ModelOpt's name of what the linear `name` is run in; None: not quantized."""
        parent, _, last = name.rpartition(".")
        if parent.rpartition(".")[0].endswith(".experts"):
            name = f"{parent.rpartition('.')[0]}.{self.experts}".removesuffix(".")
        elif last in self.widths:
            name = f"{parent}.qkv_proj"
        return self.algorithm(getattr(self.modules[name], "quant_method", None))
