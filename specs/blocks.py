"""The block kinds: for each its table in the spec, what the keys of that contradict, and its record.

Patterns, roles, module names, the forms of Hugging Face and Megatron, reports and generated code derive from
the records in `KINDS`; a record names where the rest of a kind is: what emits its ops, and its template. Extensions
add records of their own: see `kinds`. Module names: Megatron-Bridge,
src/megatron/bridge/models/nemotronh/nemotron_h_bridge.py (mapping_registry); their globs: Megatron-LM,
megatron/core/models/hybrid (0.19.2); config keys: transformers 5.23, configuration_nemotron_h.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from .block_kind import BlockKind, ConfigKey, Module, Say, Values
from .keys import COUNT, LAYERS, MTP_LAYERS, WIDTH, key


@dataclass(frozen=True)
class Mamba:
    """[mamba]: a Mamba-2 mixer (arXiv 2405.21060). Inner width = num_heads * head_dim."""

    num_heads: int = key("Heads H.", minimum=1, maximum=COUNT)
    head_dim: int = key("Channels of a head, P.", minimum=1, maximum=COUNT)
    state_size: int = key("State of a channel, N.", minimum=1, maximum=COUNT)
    n_groups: int = key("Groups that share B and C, G; also of the gated norm.", minimum=1, maximum=COUNT)
    conv_kernel: int = key("Width of the causal convolution.", default=4, minimum=2, maximum=256)
    chunk_size: int = key("Chunk of the SSD algorithm, in tokens.", default=128, minimum=1, maximum=COUNT)
    conv_bias: bool = key("Whether the convolution has a bias.", default=True)
    time_step_min: float = key("Smallest fresh time step.", default=1e-3, above=0)
    time_step_max: float = key("Largest fresh time step.", default=0.1, above=0)
    time_step_floor: float = key("Floor of fresh time steps.", default=1e-4, above=0)

    @property
    def inner_size(self) -> int:
        """Width of z and x: num_heads * head_dim (`expand` of published configs is dead)."""
        return self.num_heads * self.head_dim

    @property
    def conv_size(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner_size + 2 * self.n_groups * self.state_size

    @property
    def in_proj_size(self) -> int:
        """Rows of in_proj, in this order: z, (x, B, C), dt."""
        return self.inner_size + self.conv_size + self.num_heads


def _mamba_contradictions(values: Values, say: Say) -> None:
    heads, groups = values.get("mamba.num_heads"), values.get("mamba.n_groups")
    if heads and groups and heads % groups:
        # The inner width, heads * head_dim, is then a multiple of the groups as the gated norm needs.
        say("mamba.num_heads", "E0202", f"`num_heads` {heads} is not a multiple of `n_groups` {groups}", None)
    _too_wide("mamba", values, say)
    low, high = values.get("mamba.time_step_min"), values.get("mamba.time_step_max")
    if low and high and low > high:
        say("mamba.time_step_min", "E0203", f"`time_step_min` {low} is more than `time_step_max` {high}", None)


MAMBA = BlockKind(
    symbol="M",
    name="mamba2",
    title="Mamba-2",
    legend="Mamba-2",
    class_name="Mamba2",
    table="mamba",
    table_class=Mamba,
    lowering="n3c.passes.lower.blocks:mamba2",
    modules=(
        Module("mamba.in_proj", "in_proj", megatron="*mixer.in_proj"),
        Module("mamba.conv1d", "conv1d", linear=False),
        Module("mamba.out_proj", "out_proj", megatron="*mixer.out_proj"),
    ),
    vectors=dict.fromkeys(("A_log", "D", "dt_bias"), "mamba.ssm"),
    letters={
        "H": "heads",
        "P": "channels of a head",
        "N": "state size",
        "G": "groups of heads that share B and C",
        "R": "heads of a group",
        "X": "channels of the convolution",
        "W": "taps of the convolution",
        "Q": "tokens of a chunk",
    },
    hf_names=("linear_attention", "mamba"),
    config_keys=(
        ConfigKey("num_heads", "mamba_num_heads", 128),
        ConfigKey("head_dim", "mamba_head_dim", 64),
        ConfigKey("state_size", "ssm_state_size", 128, ("mamba_state_dim",)),
        ConfigKey("n_groups", "n_groups", 8, ("mamba_n_groups", "mamba_num_groups"), "mamba_n_groups"),  # SGLang
        ConfigKey("conv_kernel", "conv_kernel", 4, ("mamba_d_conv",)),
        ConfigKey("chunk_size", "chunk_size", 128, ("mamba_chunk_size",)),
        ConfigKey("conv_bias", "use_conv_bias", True, ("mamba_conv_bias",)),
        ConfigKey("time_step_min", "time_step_min", 1e-3, ("mamba_dt_min",)),
        ConfigKey("time_step_max", "time_step_max", 0.1, ("mamba_dt_max",)),
        ConfigKey("time_step_floor", "time_step_floor", 1e-4, ("mamba_dt_init_floor",)),
    ),
    contradictions=_mamba_contradictions,
    stateful=True,
    files=("autocast.py", "convolution.py", "ssd.py"),
    imports={
        "convolution": ("CausalConv1d",),
        "float32": ("KeepsFloat32",),
        "norm": ("GatedRMSNorm",),
        "ssd": ("mixer_kernels", "scan"),
    },
)


@dataclass(frozen=True)
class Attention:
    """[attention]: grouped-query attention without position encoding."""

    num_heads: int = key("Query heads.", minimum=1, maximum=COUNT)
    num_kv_heads: int = key("Key and value heads.", minimum=1, maximum=COUNT)
    head_dim: int = key("Channels of a head.", minimum=1, maximum=COUNT)


def _attention_contradictions(values: Values, say: Say) -> None:
    heads, shared = values.get("attention.num_heads"), values.get("attention.num_kv_heads")
    if heads and shared and heads % shared:
        message = f"`num_heads` {heads} is not a multiple of `num_kv_heads` {shared}"
        say("attention.num_heads", "E0204", message, "each key and value head serves equally many query heads")
    _too_wide("attention", values, say)


ATTENTION = BlockKind(
    symbol="*",
    name="attention",
    title="attention",
    legend="attention",
    class_name="Attention",
    table="attention",
    table_class=Attention,
    lowering="n3c.passes.lower.blocks:attention",
    modules=(
        Module("attention.q_proj", "q_proj", megatron="*.linear_qkv"),
        Module("attention.k_proj", "k_proj", megatron="*.linear_qkv"),
        Module("attention.v_proj", "v_proj", megatron="*.linear_qkv"),
        Module("attention.o_proj", "o_proj", megatron="*.linear_proj"),
    ),
    letters={
        "J": "query heads",
        "Y": "key and value heads",
        "Z": "channels of a head",
        "C": "tokens that the cache holds",
    },
    hf_names=("full_attention", "attention"),
    config_keys=(
        ConfigKey("num_heads", "num_attention_heads", 32),
        ConfigKey("num_kv_heads", "num_key_value_heads", 8),
        ConfigKey("head_dim", "head_dim", 128, ("attention_head_dim",)),
    ),
    contradictions=_attention_contradictions,
    stateful=True,
    in_mtp=True,
    files=("attention.py",),
    imports={"attention": ("causal_attention",)},
)


@dataclass(frozen=True)
class MoeLayers:
    """[[moe.layers]]: keys of [moe] that differ in some layers; of several entries the last one decides, key by key."""

    layers: str = key('"3", "3..9", "first N", "last N"; "mtp": the blocks of MTP.', regex=f"{LAYERS}|{MTP_LAYERS}")
    top_k: int | None = key("Experts a token.", default=None, minimum=1, maximum=COUNT)
    intermediate_size: int | None = key("Inner width of a routed expert.", default=None, minimum=1, maximum=WIDTH)
    shared_intermediate_size: int | None = key(
        "Inner width of the shared expert, where [moe] has one.", default=None, minimum=1, maximum=WIDTH
    )


@dataclass(frozen=True)
class Moe:
    """[moe]: routed experts with squared ReLU, in a latent width where `latent_size` is given."""

    num_experts: int = key("Routed experts.", minimum=1, maximum=COUNT)
    top_k: int = key("Experts a token.", minimum=1, maximum=COUNT)
    intermediate_size: int = key("Inner width of a routed expert.", minimum=1, maximum=WIDTH)
    shared_intermediate_size: int = key(
        "Inner width of the shared expert; 0: none.", default=0, minimum=0, maximum=WIDTH
    )
    latent_size: int | None = key(
        "Width in which experts live (LatentMoE); leave out for a standard MoE.",
        default=None,
        minimum=1,
        maximum=WIDTH,
    )
    routed_scaling_factor: float = key("Factor of the routed sum.", default=1.0, above=0)
    norm_topk_prob: bool = key("Whether the chosen scores are divided by their sum.", default=True)
    n_group: int = key("Router groups.", default=1, minimum=1, maximum=COUNT)
    topk_group: int = key("Router groups that a token may use.", default=1, minimum=1, maximum=COUNT)
    layers: tuple[MoeLayers, ...] = key("Layers that differ: compressed models.", default=())


def _moe_contradictions(values: Values, say: Say) -> None:
    experts, top_k = values.get("moe.num_experts"), values.get("moe.top_k")
    groups, chosen = values.get("moe.n_group"), values.get("moe.topk_group")
    if experts and top_k and top_k > experts:
        say("moe.top_k", "E0206", f"`top_k` {top_k} is more than `num_experts` {experts}", None)
    if groups and chosen and chosen > groups:
        say("moe.topk_group", "E0207", f"`topk_group` {chosen} is more than `n_group` {groups}", None)
    if not experts or not groups:
        return
    if experts % groups:
        say("moe.num_experts", "E0208", f"`num_experts` {experts} is not a multiple of `n_group` {groups}", None)
    elif groups > 1 and experts // groups < 2:
        advice = "a group is ranked by the sum of its two best scores"
        say("moe.n_group", "E0209", f"{groups} groups of {experts} experts: a group needs two or more", advice)
    elif chosen and top_k and chosen <= groups and experts // groups * chosen < top_k <= experts:
        allowed = experts // groups * chosen
        message = f"`top_k` {top_k} is more than the {allowed} experts that `topk_group` {chosen} leaves"
        say("moe.top_k", "E0210", message, None)


_LATENT, _SHARED, _EXPERTS = "latent_size", "shared_intermediate_size", "num_experts"

MOE = BlockKind(
    symbol="E",
    name="moe",
    title="MoE",
    legend="mixture of experts",
    class_name="MoE",
    table="moe",
    table_class=Moe,
    lowering="n3c.passes.lower.blocks:moe",
    modules=(
        Module("moe.router", "gate"),
        Module("moe.latent_down", "fc1_latent_proj", _LATENT, megatron="*mlp.fc1_latent_proj"),
        Module("moe.latent_up", "fc2_latent_proj", _LATENT, megatron="*mlp.fc2_latent_proj"),
        Module("moe.experts.up", "experts.{}.up_proj", count=_EXPERTS, megatron="*mlp.experts.linear_fc1"),
        Module("moe.experts.down", "experts.{}.down_proj", count=_EXPERTS, megatron="*mlp.experts.linear_fc2"),
        Module("moe.shared.up", "shared_experts.up_proj", _SHARED, megatron="*mlp.shared_experts.linear_fc1"),
        Module("moe.shared.down", "shared_experts.down_proj", _SHARED, megatron="*mlp.shared_experts.linear_fc2"),
    ),
    letters={
        "E": "experts",
        "K": "experts of each token",
        "I": "inner width of an expert",
        "L": "width of the experts",
        "U": "inner width of the shared expert",
        "T": "tokens of all sequences, B * S",
        "M": "choices of experts, T * K",
    },
    hf_names=("moe",),
    config_keys=(
        ConfigKey("num_experts", "n_routed_experts", 8, ("num_local_experts",)),
        ConfigKey("top_k", "num_experts_per_tok", 2),
        ConfigKey("intermediate_size", "moe_intermediate_size", 7688),
        ConfigKey("shared_intermediate_size", "moe_shared_expert_intermediate_size", 7688),
        ConfigKey("latent_size", "moe_latent_size", None),
        ConfigKey("routed_scaling_factor", "routed_scaling_factor", 1.0),
        ConfigKey("norm_topk_prob", "norm_topk_prob", True),
        ConfigKey("n_group", "n_group", 1),
        ConfigKey("topk_group", "topk_group", 1),
    ),
    contradictions=_moe_contradictions,
    in_mtp=True,
    files=("activation.py", "autocast.py", "balance.py", "grouped.py", "routing.py"),
    imports={
        "activation": ("squared_relu",),
        "autocast": ("float32_products",),
        "balance": ("RouterStatistics", "WithLoss", "router_statistics", "total_statistics"),
        "float32": ("KeepsFloat32",),
        "grouped": ("grouped_kernels", "grouped_linear", "sort_by_expert", "weighted_sum"),
    },
)


@dataclass(frozen=True)
class Mlp:
    """[mlp]: a dense MLP with squared ReLU."""

    intermediate_size: int = key("Inner width.", minimum=1, maximum=WIDTH)


MLP = BlockKind(
    symbol="-",
    name="mlp",
    title="MLP",
    legend="dense MLP",
    class_name="MLP",
    table="mlp",
    table_class=Mlp,
    lowering="n3c.passes.lower.blocks:mlp",
    modules=(
        Module("mlp.up", "up_proj", megatron="*.mlp.linear_fc1"),
        Module("mlp.down", "down_proj", megatron="*.mlp.linear_fc2"),
    ),
    letters={"F": "inner width"},
    hf_names=("mlp",),
    config_keys=(ConfigKey("intermediate_size", "intermediate_size", 21504),),
    files=("activation.py",),
    imports={"activation": ("squared_relu",)},
)


GENERAL_LETTERS = {
    "B": "sequences",
    "S": "tokens of each",
    "D": "hidden size",
    "V": "vocabulary",
}
"""Letters of every model. Of a plain linear [out, in] the two sizes are written out; in equations of Mamba-2, A, B, C
and D are tensors, as in its paper."""
KINDS = (MAMBA, MOE, ATTENTION, MLP)
"""Every block kind of n3c itself, in the order in which specs, reports and generated code have them."""
LEGEND = ", ".join(f"{kind.symbol} {kind.title}" for kind in KINDS)
"""The symbols of patterns, in words."""


def _too_wide(table: str, values: Values, say: Say) -> None:
    heads, head_dim = values.get(f"{table}.num_heads"), values.get(f"{table}.head_dim")
    if heads and head_dim and heads * head_dim > 1 << 24:
        message = f"`num_heads` * `head_dim` is {heads * head_dim}, more than {1 << 24}"
        say(f"{table}.num_heads", "E0205", message, None)
