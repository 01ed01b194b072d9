"""What transformers' nemotron_h configuration calls each key of a spec, its default there, and aliases.

Source: transformers 5.23, models/nemotron_h/configuration_nemotron_h.py.
"""

from __future__ import annotations

from typing import Any

from .huggingface_blocks import MTP as MTP_BLOCKS
from .huggingface_blocks import TRUNK
from .kinds import kinds
from .places import Path

Fields = dict[Path, tuple[str, Any, tuple[str, ...]]]
"""Spec key → (name in config.json, default of NemotronHConfig, other names in use)."""
_MODEL: Fields = {
    ("model", "hidden_size"): ("hidden_size", 4096, ()),
    ("model", "vocab_size"): ("vocab_size", 131072, ()),
    ("model", "max_position_embeddings"): ("max_position_embeddings", 4096, ()),
    ("model", "norm_eps"): ("layer_norm_epsilon", 1e-5, ("norm_eps", "rms_norm_eps")),
    ("model", "tie_word_embeddings"): ("tie_word_embeddings", False, ()),
    ("model", "initializer_range"): ("initializer_range", 0.02, ()),
    ("model", "rescale_prenorm_residual"): ("rescale_prenorm_residual", True, ()),
    ("model", "pad_token_id"): ("pad_token_id", 0, ()),
    ("model", "bos_token_id"): ("bos_token_id", 1, ()),
    ("model", "eos_token_ids"): ("eos_token_id", 2, ()),
}


def config_fields() -> Fields:
    """Return the fields of a config.json for each key of a spec, those of the known block kinds among them."""
    own: Fields = {
        (kind.table, key.key): (key.name, key.default, key.aliases) for kind in kinds() for key in kind.config_keys
    }
    return {**_MODEL, **own}


def written_twice() -> dict[str, str]:
    """Return the fields that are written under a second name, too: name → second name."""
    return {key.name: key.also for kind in kinds() for key in kind.config_keys if key.also}


# Features that a spec cannot say: name → the values that mean "not used"
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "use_bias": (False,),
    "mlp_bias": (False,),
    "attention_bias": (False,),
    "mamba_proj_bias": (False,),
    "attention_dropout": (0, 0.0),
    "mlp_hidden_act": ("relu2",),
    "mamba_hidden_act": ("silu", "swish"),
}

# Names that say nothing about the architecture; every other unknown name is mentioned when dropped.
SILENT = {
    "architectures",
    "model_type",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "auto_map",
    "_name_or_path",
    "use_cache",
    "num_logits_to_keep",
    "output_router_logits",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "is_encoder_decoder",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "problem_type",
    "quantization_config",
    "n3c",
}
# Lists of block types: read in any spelling, never written (see export_config).
PATTERN_LISTS = ("layers_block_type", "layer_types")
MTP_PATTERN_LISTS = ("mtp_layers_block_type",)
PATTERNS = (*PATTERN_LISTS, "hybrid_override_pattern", "num_hidden_layers", TRUNK)
MTP = (
    "num_nextn_predict_layers",
    *MTP_PATTERN_LISTS,
    MTP_BLOCKS,
    "mtp_hybrid_override_pattern",
    "mtp_num_layers",
    "mtp_loss_scaling_factor",
)
STATE_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
TIME_STEP_MIN = "time_step_min"
"""Key of `n3c`: the smallest fresh time step, where the field of that name keeps transformers from bounding dt."""
N3C_KEYS = ("name", "pipeline_cuts", "quantization", "training", "serving", TIME_STEP_MIN, "moe_layers")
