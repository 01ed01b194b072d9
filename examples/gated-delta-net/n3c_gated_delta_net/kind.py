"""The record of the block kind `G`: all that specs, reports and generated code derive from it.

Names of modules and of configuration keys are those of transformers' Qwen3-Next (5.23, configuration_qwen3_next.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from n3c.specs.block_kind import CONTRADICTION, BlockKind, ConfigKey, Module, Say, Values
from n3c.specs.keys import COUNT, key


@dataclass(frozen=True)
class GatedDeltaNet:
    """[gated_delta_net]: linear attention whose state forgets, and is corrected (arXiv 2412.06464)."""

    num_key_heads: int = key("Heads of queries and keys.", minimum=1, maximum=COUNT)
    num_value_heads: int = key("Heads of values, a multiple of those of keys.", minimum=1, maximum=COUNT)
    key_head_dim: int = key("Channels of a query or key.", minimum=1, maximum=COUNT)
    value_head_dim: int = key("Channels of a value.", minimum=1, maximum=COUNT)
    conv_kernel: int = key("Taps of the causal convolution.", default=4, minimum=2, maximum=256)

    @property
    def key_size(self) -> int:
        """Width of all keys, and of all queries."""
        return self.num_key_heads * self.key_head_dim

    @property
    def value_size(self) -> int:
        """Width of all values, and of their gate."""
        return self.num_value_heads * self.value_head_dim

    @property
    def shared(self) -> int:
        """Value heads that share a key."""
        return self.num_value_heads // self.num_key_heads


def _contradictions(values: Values, say: Say) -> None:
    keys, heads = values.get("gated_delta_net.num_key_heads"), values.get("gated_delta_net.num_value_heads")
    if keys and heads and heads % keys:
        message = f"`num_value_heads` {heads} is not a multiple of `num_key_heads` {keys}"
        say("gated_delta_net.num_value_heads", CONTRADICTION, message, "each key serves equally many values")


GATED_DELTA_NET = BlockKind(
    symbol="G",
    name="gated_delta_net",
    title="gated delta net",
    legend="gated delta net",
    class_name="GatedDeltaNet",
    table="gated_delta_net",
    table_class=GatedDeltaNet,
    lowering="n3c_gated_delta_net.lowering:gated_delta_net",
    modules=(
        Module("gated_delta_net.in_proj_qkvz", "in_proj_qkvz"),
        Module("gated_delta_net.in_proj_ba", "in_proj_ba"),
        Module("gated_delta_net.conv1d", "conv1d", linear=False),
        Module("gated_delta_net.out_proj", "out_proj"),
    ),
    vectors=dict.fromkeys(("A_log", "dt_bias"), "gated_delta_net.decay"),
    letters={
        "Hk": "heads of keys",
        "Hv": "heads of values",
        "Dk": "channels of a key",
        "Dv": "channels of a value",
        "Xg": "channels of the convolution",
    },
    hf_names=("gated_delta_net",),
    config_keys=(
        ConfigKey("num_key_heads", "linear_num_key_heads", 16),
        ConfigKey("num_value_heads", "linear_num_value_heads", 32),
        ConfigKey("key_head_dim", "linear_key_head_dim", 128),
        ConfigKey("value_head_dim", "linear_value_head_dim", 128),
        ConfigKey("conv_kernel", "linear_conv_kernel_dim", 4),
    ),
    contradictions=_contradictions,
    stateful=True,
    in_transformers=False,
    templates="n3c_gated_delta_net",
    files=("autocast.py", "gated_delta.py"),
    imports={"float32": ("KeepsFloat32",), "gated_delta": ("ShortConv1d", "NormThenGate", "gated_delta")},
)
