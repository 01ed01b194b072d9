"""Random small models of transformers: the oracle of every implementation."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from n3c.specs.kinds import by_symbol


def random_config(seed: int) -> NemotronHConfig:
    """Return a small random configuration; sizes are often odd, and every variant turns up."""
    r = random.Random(seed)
    groups = r.choice([1, 2, 3])
    experts, router_groups = r.choice([(6, 1), (8, 2), (9, 3), (12, 4), (16, 1), (5, 1)])
    topk_group = r.randint(1, router_groups)
    kv_heads = r.choice([1, 2, 3])
    blocks = r.choices("ME*-", k=r.randint(3, 6))
    pattern = "".join(r.sample(["M", "E", "*", *blocks], k=len(blocks) + 3))
    return NemotronHConfig(
        vocab_size=r.randint(30, 120),
        hidden_size=r.choice([24, 40, 37, 64]),
        layers_block_type=[by_symbol()[symbol].hf_names[0] for symbol in pattern],
        num_attention_heads=kv_heads * r.choice([1, 2, 4]),
        num_key_value_heads=kv_heads,
        head_dim=r.choice([8, 13, 32]),
        intermediate_size=r.choice([31, 64]),
        mamba_num_heads=groups * r.choice([1, 2, 4]),
        mamba_head_dim=r.choice([5, 8, 16]),
        ssm_state_size=r.choice([7, 16, 32]),
        n_groups=groups,
        conv_kernel=r.choice([2, 3, 4, 4]),
        chunk_size=r.choice([4, 7, 16, 128]),
        use_conv_bias=r.random() < 0.7,
        n_routed_experts=experts,
        n_group=router_groups,
        topk_group=topk_group,
        num_experts_per_tok=r.randint(1, min(4, topk_group * (experts // router_groups))),
        moe_intermediate_size=r.choice([17, 24, 48]),
        moe_shared_expert_intermediate_size=r.choice([19, 40]),
        moe_latent_size=r.choice([None, 16, 11]),
        routed_scaling_factor=r.choice([1.0, 2.5]),
        norm_topk_prob=r.random() < 0.7,
        initializer_range=0.1,
        layer_norm_epsilon=r.choice([1e-5, 1e-6]),
    )


def small_config(pattern: str, **changes: Any) -> NemotronHConfig:
    """Return a configuration with the blocks of `pattern`, every width a multiple of 16; `changes` are other keys."""
    sizes: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 64,
        "layers_block_type": [by_symbol()[symbol].hf_names[0] for symbol in pattern],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "moe_shared_expert_intermediate_size": 80,
        "moe_latent_size": 32,
    }
    return NemotronHConfig(**(sizes | changes))


def transformers_model(config: NemotronHConfig, seed: int) -> Any:
    """Return transformers' model in float32, with nothing left at ones or zeros.

    transformers clamps dt at `time_step_min` in whole-sequence form only, so dt stays above it.
    """
    torch.manual_seed(seed)
    model = NemotronHForCausalLM(config).eval()
    model.set_experts_implementation("eager")  # its grouped form refuses odd sizes
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("dt_bias"):
                tensor.uniform_(-1.0, 1.0)
            elif name.endswith("e_score_correction_bias"):
                tensor.uniform_(-0.2, 0.2)
            elif name.endswith(("norm.weight", "norm_f.weight", ".D")):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("conv1d.bias"):
                tensor.uniform_(-0.5, 0.5)
    return model
