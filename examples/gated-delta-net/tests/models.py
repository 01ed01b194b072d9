"""Small models of the tests: their specs, generated code, weights, and the same model of transformers' modules."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from n3c.backends.torch.emit import emit
from n3c.backends.torch.loading import load_package
from n3c.specs.load import parse_spec
from n3c.specs.schema import Spec

SPEC = """
schema = 1
name = "gated"
[model]
hidden_size = 64
vocab_size = 97
max_position_embeddings = 256
pattern = "GG"
norm_eps = 1e-6
initializer_range = 0.2
[gated_delta_net]
num_key_heads = 2
num_value_heads = 4
key_head_dim = 16
value_head_dim = 32
[serving]
max_seq_len = 128
prefill_chunk = 40
conv_state_dtype = "fp32"
"""
HYBRID = (
    SPEC.replace('"GG"', '"MG*G"')
    + """kv_cache_dtype = "fp32"
draft_tokens = 2
[mamba]
num_heads = 8
head_dim = 16
state_size = 16
n_groups = 2
[attention]
num_heads = 4
num_kv_heads = 2
head_dim = 16
[mtp]
pattern = "*"
"""
)
"""Beside another kind with a convolution, and with steps that verify drafts."""


def spec_of(text: str) -> Spec:
    """Return the spec of a text."""
    return parse_spec(text, "spec.toml")[0]


def generated(spec: Spec) -> ModuleType:
    """Return the package that n3c generates for a spec."""
    module: ModuleType = load_package(emit(spec, "0" * 64))
    return module


def model_of(package: Any, seed: int = 0) -> Any:
    """Return the model of a generated package with fresh weights, its vectors too away from their first values."""
    torch.manual_seed(seed)
    model = package.Model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def checkpoint(package: Any, folder: Path) -> Path:
    """Write a checkpoint of fresh weights in BF16, as released ones are; return its folder."""
    package.save_checkpoint(model_of(package).bfloat16(), folder)
    return folder


class Qwen(nn.Module):
    """Embedding, blocks x + mixer(norm(x)) with the mixers of transformers, norm and head, of a model's weights."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        table = model.config
        config = Qwen3NextConfig(
            hidden_size=table.hidden_size,
            linear_num_key_heads=table.gated_delta_net_num_key_heads,
            linear_num_value_heads=table.gated_delta_net_num_value_heads,
            linear_key_head_dim=table.gated_delta_net_key_head_dim,
            linear_value_head_dim=table.gated_delta_net_value_head_dim,
            linear_conv_kernel_dim=table.gated_delta_net_conv_kernel,
            num_hidden_layers=len(table.pattern),
            layer_types=["linear_attention"] * len(table.pattern),
            rms_norm_eps=table.norm_eps,
        )
        self.eps = table.norm_eps
        self.embedding = nn.Parameter(model.backbone.embeddings.weight.detach().clone())
        self.head = nn.Parameter(model.lm_head.weight.detach().clone())
        self.norm = nn.Parameter(model.backbone.norm_f.weight.detach().clone())
        self.norms = nn.ParameterList(block.norm.weight.detach().clone() for block in model.backbone.layers)
        self.mixers = nn.ModuleList(Qwen3NextGatedDeltaNet(config, index) for index in range(len(table.pattern)))
        for mixer, block in zip(self.mixers, model.backbone.layers, strict=True):
            mixer.load_state_dict(block.mixer.state_dict())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding[ids]
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(F.rms_norm(x, x.shape[-1:], norm, self.eps))
        return F.rms_norm(x, x.shape[-1:], self.norm, self.eps) @ self.head.T

    def by_name(self) -> dict[str, Tensor]:
        """Return the parameters by their names in n3c's model."""
        named: dict[str, Tensor] = {"backbone.embeddings.weight": self.embedding, "lm_head.weight": self.head}
        named["backbone.norm_f.weight"] = self.norm
        for index, (norm, mixer) in enumerate(zip(self.norms, self.mixers, strict=True)):
            at = f"backbone.layers.{index}"
            named[f"{at}.norm.weight"] = norm
            named |= {f"{at}.mixer.{name}": parameter for name, parameter in mixer.named_parameters()}
        return named
