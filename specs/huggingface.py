"""Hugging Face's nemotron_h configuration to a spec and back, without loss.

Source of names, aliases and defaults: transformers 5.23, models/nemotron_h/configuration_nemotron_h.py.
What Hugging Face has no name for (numerics, serving, pipeline cuts) stands in one object, `"n3c"`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Severity, Span

from .json_places import JsonPlaces
from .modelopt import QuantizationError, import_quantization, role_globs
from .modules import Group, module_groups
from .pattern import (
    MAX_BLOCKS,
    BlockKind,
    Pattern,
    PatternError,
    from_hybrid_override,
    from_layers_block_type,
    to_layers_block_type,
    to_megatron,
)
from .places import Path, shown
from .reader import in_order, read_spec
from .schema import Moe, Spec

# Spec key → (name in config.json, default of NemotronHConfig, other names in use)
FIELDS: dict[Path, tuple[str, Any, tuple[str, ...]]] = {
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
    ("mamba", "num_heads"): ("mamba_num_heads", 128, ()),
    ("mamba", "head_dim"): ("mamba_head_dim", 64, ()),
    ("mamba", "state_size"): ("ssm_state_size", 128, ("mamba_state_dim",)),
    ("mamba", "n_groups"): ("n_groups", 8, ("mamba_n_groups", "mamba_num_groups")),
    ("mamba", "conv_kernel"): ("conv_kernel", 4, ("mamba_d_conv",)),
    ("mamba", "chunk_size"): ("chunk_size", 128, ("mamba_chunk_size",)),
    ("mamba", "conv_bias"): ("use_conv_bias", True, ("mamba_conv_bias",)),
    ("mamba", "time_step_min"): ("time_step_min", 1e-3, ("mamba_dt_min",)),
    ("mamba", "time_step_max"): ("time_step_max", 0.1, ("mamba_dt_max",)),
    ("mamba", "time_step_floor"): ("time_step_floor", 1e-4, ("mamba_dt_init_floor",)),
    ("attention", "num_heads"): ("num_attention_heads", 32, ()),
    ("attention", "num_kv_heads"): ("num_key_value_heads", 8, ()),
    ("attention", "head_dim"): ("head_dim", 128, ("attention_head_dim",)),
    ("moe", "num_experts"): ("n_routed_experts", 8, ("num_local_experts",)),
    ("moe", "top_k"): ("num_experts_per_tok", 2, ()),
    ("moe", "intermediate_size"): ("moe_intermediate_size", 7688, ()),
    ("moe", "shared_intermediate_size"): ("moe_shared_expert_intermediate_size", 7688, ()),
    ("moe", "latent_size"): ("moe_latent_size", None, ()),
    ("moe", "routed_scaling_factor"): ("routed_scaling_factor", 1.0, ()),
    ("moe", "norm_topk_prob"): ("norm_topk_prob", True, ()),
    ("moe", "n_group"): ("n_group", 1, ()),
    ("moe", "topk_group"): ("topk_group", 1, ()),
    ("mlp", "intermediate_size"): ("intermediate_size", 21504, ()),
}

# Features that a spec cannot say: name → the values that mean "not used"
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "use_bias": (False,),
    "mlp_bias": (False,),
    "attention_bias": (False,),
    "mamba_proj_bias": (False,),
    "attention_dropout": (0, 0.0),
    "mlp_hidden_act": ("relu2",),
    "mamba_hidden_act": ("silu", "swish"),
    "block_configs": (None,),
    "mtp_block_configs": (None,),
}

# Names that say nothing about the architecture; every other unknown name is mentioned when dropped.
_SILENT = {
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
_PATTERNS = ("layers_block_type", "layer_types", "hybrid_override_pattern", "num_hidden_layers")
_MTP = (
    "num_nextn_predict_layers",
    "mtp_layers_block_type",
    "mtp_hybrid_override_pattern",
    "mtp_num_layers",
    "mtp_loss_scaling_factor",
)
_STATE_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_TABLES = {BlockKind.MAMBA: "mamba", BlockKind.ATTENTION: "attention", BlockKind.MOE: "moe", BlockKind.MLP: "mlp"}
_N3C_KEYS = ("name", "pipeline_cuts", "quantization", "training", "serving")


def import_config(
    config: Mapping[str, object],
    places: JsonPlaces,
    name: str,
    quantization: Mapping[str, object] | None = None,
    quantization_places: JsonPlaces | None = None,
) -> tuple[Spec, list[Diagnostic]]:
    """Turn a nemotron_h config into a spec; return it with the warnings.

    `name` is used where the config has no `n3c.name`. `quantization` is the `quantization` object
    of a hf_quant_config.json, which outranks `quantization_config`. Raises N3CError (SPEC) with
    every error, located in the JSON text.
    """
    return _Importer(config, places).run(name, quantization, quantization_places or places)


class _Importer:
    def __init__(self, config: Mapping[str, object], places: JsonPlaces) -> None:
        self.config = config
        self.places = places
        self.found: list[Diagnostic] = []
        self.raw: dict[str, Any] = {"schema": 1, "model": {}}

    def error(self, code: str, message: str, span: Span, advice: str | None = None) -> None:
        self.found.append(Diagnostic(code, message, span, help=advice))

    def warn(self, code: str, message: str, span: Span, advice: str | None = None) -> None:
        self.found.append(Diagnostic(code, message, span, Severity.WARNING, advice))

    def run(
        self, name: str, quantization: Mapping[str, object] | None, quantization_places: JsonPlaces
    ) -> tuple[Spec, list[Diagnostic]]:
        self.model_type()
        own = self.own()
        main, mtp = self.pattern(), self.mtp()
        if main is not None:
            self.cuts(main, own)
            self.fields(main, mtp)
        self.unsupported()
        self.dead()
        if main is None:
            raise self.failure()
        self.raw["name"] = own.get("name", name)
        self.serving(own)
        for table in ("quantization", "training"):
            if table in own:
                self.raw[table] = own[table]
        self.quantization(main, mtp, own, quantization, quantization_places)
        spec, more = read_spec(self.raw, self.places, self.places.start)
        self.found += more
        if spec is None or any(item.severity is Severity.ERROR for item in self.found):
            raise self.failure()
        return spec, self.found

    def failure(self) -> N3CError:
        return N3CError(in_order(self.found, self.places.start.file), ExitCode.SPEC)

    # What model this is

    def model_type(self) -> None:
        kind = self.config.get("model_type")
        if kind not in ("nemotron_h", "nemotron_h_dense", "nemotron_h_sparse"):
            message = "missing `model_type`" if kind is None else f"`model_type` is `{shown(str(kind))}`"
            self.error("E0302", f"{message}: not a nemotron_h config", self.places.json_value("model_type"))

    def own(self) -> Mapping[str, Any]:
        """Return the `n3c` object."""
        own = self.config.get("n3c", {})
        if not isinstance(own, dict):
            self.error("E0302", "`n3c` must be an object", self.places.json_value("n3c"))
            return {}
        for name in cast("dict[str, object]", own):
            if name not in _N3C_KEYS:
                message = f"unknown key `{shown(name)}` in `n3c`"
                self.error("E0302", message, self.places.json_key("n3c", name), f"known: {', '.join(_N3C_KEYS)}")
        for name in ("name", "quantization", "training", "serving"):
            self.places.names[(name,)] = ("n3c", name)
        return cast("dict[str, Any]", own)

    # Patterns

    def pattern(self) -> Pattern | None:
        before = len(self.found)
        main = self.agreed(("layers_block_type", "layer_types"), "hybrid_override_pattern")
        if main is None:
            if len(self.found) == before:
                message = "missing `layers_block_type` or `hybrid_override_pattern`"
                self.error("E0302", message, self.places.start)
            return None
        count = self.config.get("num_hidden_layers")
        if count is not None and count != len(main):
            message = f"`num_hidden_layers` is {shown(str(count))}, but the pattern has {len(main)} blocks"
            self.error("E0303", message, self.places.json_value("num_hidden_layers"))
        return main

    def agreed(self, lists: Sequence[str], text: str) -> Pattern | None:
        """Read a pattern that may be written as a list and as a string; both must say the same."""
        read = [(name, self.one_pattern(name)) for name in (*lists, text) if self.config.get(name) is not None]
        patterns = [(name, pattern) for name, pattern in read if pattern is not None]
        for name, pattern in patterns[1:]:
            first, expected = patterns[0]
            if pattern != expected:
                message = f"`{name}` is {_short(pattern)}, but `{first}` is {_short(expected)}"
                self.error("E0303", message, self.places.json_value(name))
        if patterns:
            path = ("mtp", "pattern") if text.startswith("mtp") else ("model", "pattern")
            self.places.names[path] = (patterns[0][0],)
            return patterns[0][1]
        return None

    def one_pattern(self, name: str) -> Pattern | None:
        raw = self.config[name]
        try:
            if isinstance(raw, list) and "hybrid" not in name:
                return from_layers_block_type([str(entry) for entry in cast("list[object]", raw)])
            if isinstance(raw, str) and "hybrid" in name:
                return from_hybrid_override(raw)
        except PatternError as error:
            span = self.places.json_inside((name,), error.offset, error.length)
            self.error("E0108", f"`{name}`: {error.message}", span, error.advice)
            return None
        wanted = "a string" if "hybrid" in name else "a list of names"
        self.error("E0105", f"`{name}` must be {wanted}", self.places.json_value(name))
        return None

    def cuts(self, main: Pattern, own: Mapping[str, Any]) -> None:
        raw: object = own.get("pipeline_cuts", [])
        cuts = cast("list[int]", raw) if isinstance(raw, list) else [-1]
        good = all(type(cut) is int and 0 <= cut <= len(main) for cut in cuts) and cuts == sorted(cuts)
        if not good or len(cuts) > MAX_BLOCKS:
            message = f"`pipeline_cuts` must be layers from 0 to {len(main)}, in order"
            self.error("E0302", message, self.places.json_value("n3c", "pipeline_cuts"))
            cuts = []
        self.raw["model"]["pattern"] = to_megatron(dataclasses.replace(main, stages=tuple(cuts)))

    def mtp(self) -> Pattern | None:
        steps = self.config.get("num_nextn_predict_layers", 0)
        if steps is None or steps == 0:
            return None
        if steps != 1 or type(steps) is not int:
            message = f"`num_nextn_predict_layers` is {shown(str(steps))}: one set of MTP weights is supported"
            advice = "steps that share weights are `num_nextn_predict_layers` 1 with `mtp_num_layers`"
            self.error("E0304", message, self.places.json_value("num_nextn_predict_layers"), advice)
            return None
        before = len(self.found)
        pattern = self.agreed(("mtp_layers_block_type",), "mtp_hybrid_override_pattern")
        if pattern is None and len(self.found) > before:
            return None
        pattern = pattern or Pattern.parse("*E")
        self.places.names.setdefault(("mtp",), ("num_nextn_predict_layers",))
        table: dict[str, object] = {"pattern": pattern.symbols}
        self.raw["mtp"] = table
        for key, name in (("depth", "mtp_num_layers"), ("loss_scaling_factor", "mtp_loss_scaling_factor")):
            if self.config.get(name) is not None:
                table[key] = self.config[name]
                self.places.names["mtp", key] = (name,)
        return pattern

    # Sizes

    def fields(self, main: Pattern, mtp: Pattern | None) -> None:
        tables = {"model"} | {_TABLES[kind] for kind in (*main, *(mtp or ()))}
        assumed: list[str] = []
        for path, (name, default, aliases) in FIELDS.items():
            table, key = str(path[0]), str(path[1])
            if table not in tables:
                continue
            given = [alias for alias in (name, *aliases) if alias in self.config]
            for alias in given[1:]:
                if self.config[alias] != self.config[given[0]]:
                    first, second = shown(str(self.config[given[0]])), shown(str(self.config[alias]))
                    message = f"`{alias}` is {second}, but `{given[0]}` is {first}"
                    self.error("E0303", message, self.places.json_value(alias))
            if not given:
                assumed.append(name)
            else:
                self.places.names[path] = (given[0],)
            value: Any = self.config[given[0]] if given else default
            if path == ("attention", "num_kv_heads") and value is None:
                value = self.raw["attention"].get("num_heads")
            if path == ("model", "eos_token_ids"):
                value = [] if value is None else cast("Any", value) if isinstance(value, list) else [value]
            if value is not None or name not in ("pad_token_id", "bos_token_id", "moe_latent_size"):
                self.raw.setdefault(table, {})[key] = value
        if assumed:
            message = f"not given, so as in transformers' NemotronHConfig: {', '.join(assumed)}"
            self.warn("W0302", message, self.places.start)

    def unsupported(self) -> None:
        for name, unused in UNSUPPORTED.items():
            value = self.config.get(name, unused[0])
            if value not in unused:
                message = f"`{name}` is {_json(value)}: not supported"
                self.error("E0304", message, self.places.json_value(name), f"supported: {_json(unused[0])}")
        if "moe" not in self.raw:
            return
        shared, width = self.config.get("n_shared_experts", 1), self.raw["moe"]["shared_intermediate_size"]
        if shared != 1 and not (shared == 0 and width == 0):
            message = f"`n_shared_experts` is {_json(shared)}: readers disagree on what that means"
            advice = "write 1, and the whole width in `moe_shared_expert_intermediate_size` (0: none)"
            self.error("E0304", message, self.places.json_value("n_shared_experts"), advice)

    def dead(self) -> None:
        """Name, once, what has no meaning for the model."""
        known = {name for name, _, aliases in FIELDS.values() for name in (name, *aliases)}
        known |= {*UNSUPPORTED, *_PATTERNS, *_MTP, *_SILENT, "n_shared_experts", "mamba_ssm_cache_dtype"}
        dead = [name for name in self.config if name not in known]
        if dead:
            listed = ", ".join(shown(name) for name in dead[:30]) + (", ..." if len(dead) > 30 else "")
            self.warn("W0301", f"dropped, as the model does not use them: {listed}", self.places.json_key(dead[0]))

    # Numerics

    def serving(self, own: Mapping[str, Any]) -> None:
        serving: object = own.get("serving", {})
        if isinstance(serving, dict):
            table = dict(cast("dict[str, Any]", serving))
            state = self.config.get("mamba_ssm_cache_dtype")
            if state is not None:
                if state not in list(_STATE_DTYPES):
                    message = f"`mamba_ssm_cache_dtype` is {_json(state)}: not supported"
                    advice = f"supported: {', '.join(_STATE_DTYPES)}"
                    self.error("E0304", message, self.places.json_value("mamba_ssm_cache_dtype"), advice)
                table["ssm_state_dtype"] = _STATE_DTYPES.get(str(state), "fp32")
                self.places.names["serving", "ssm_state_dtype"] = ("mamba_ssm_cache_dtype",)
            if "serving" not in own and self.config.get("dtype", self.config.get("torch_dtype")) == "float32":
                table |= {"kv_cache_dtype": "fp32", "conv_state_dtype": "fp32"}
            serving = table
        if serving:
            self.raw["serving"] = serving

    def quantization(
        self,
        main: Pattern,
        mtp: Pattern | None,
        own: Mapping[str, Any],
        quantization: Mapping[str, object] | None,
        places: JsonPlaces,
    ) -> None:
        root: tuple[str, ...] = ("quantization",)
        if quantization is None:
            raw = self.config.get("quantization_config")
            if "n3c" in self.config and raw is None:
                return
            places, root = self.places, ("quantization_config",)
            quantization = cast("dict[str, object]", raw) if isinstance(raw, dict) else None
            if raw is not None and (quantization is None or quantization.get("quant_method") != "modelopt"):
                message = "only ModelOpt's quantization configs are supported"
                self.error("E0305", message, places.json_value("quantization_config", "quant_method"))
                return
        if "quantization" in own:
            return  # the spec's own words, from which a quantizer made the other
        moe = self.moe()
        groups = module_groups(main, mtp, moe, self.raw["model"].get("tie_word_embeddings") is True)
        if quantization is None:
            self.raw["quantization"] = self.policy(groups, moe)
            return
        try:
            imported = import_quantization(quantization, groups, main)
        except QuantizationError as error:
            self.error("E0305", error.message, places.json_value(*root, *error.path), error.advice)
            return
        self.raw["quantization"] = imported.table
        if imported.kv_cache_dtype is not None and "serving" not in own:
            self.raw.setdefault("serving", {})["kv_cache_dtype"] = imported.kv_cache_dtype
        if imported.unknown:
            first = shown(imported.unknown[0])
            message = f"{len(imported.unknown)} names of the quantization match no module, as `{first}`"
            self.warn("W0303", message, places.json_value(*root))

    def moe(self) -> Moe | None:
        """Return the MoE sizes that module names depend on, bad values as none; the reader reports them."""
        table: Mapping[str, Any] | None = self.raw.get("moe")
        if table is None:
            return None
        sizes = {key: value if type(value) is int and 0 < value <= 1 << 16 else 0 for key, value in table.items()}
        return Moe(
            num_experts=sizes["num_experts"],
            top_k=sizes["top_k"],
            intermediate_size=sizes["intermediate_size"],
            shared_intermediate_size=sizes["shared_intermediate_size"],
            latent_size=sizes.get("latent_size") or None,
        )

    def policy(self, groups: Sequence[Group], moe: Moe | None) -> dict[str, Any]:
        """Return the published policy: routed experts NVFP4, Mamba and shared experts FP8, the rest BF16.

        ModelOpt's recipe of Nemotron 3 Super, nvfp4-max-calib; MLPs, which it does not know, as experts.
        A weight whose input width is no multiple of 16 cannot be NVFP4 and stays BF16.
        """
        present = list(dict.fromkeys(group.role for group in groups))
        fp8 = [
            role for role in present if role in ("mamba.in_proj", "mamba.out_proj") or role.startswith("moe.shared.")
        ]
        nvfp4 = [role for role in present if role.startswith(("moe.experts.", "mlp."))]
        odd = [role for role in nvfp4 if self.input_width(role, moe) % 16]
        bf16 = [role for role in present if role not in fp8 and (role not in nvfp4 or role in odd)]
        rules = [{"roles": role_globs(fp8, present), "format": "fp8"}] if fp8 else []
        return {
            "format": "nvfp4",
            "block": [1, 16],
            "rules": [*rules, {"roles": role_globs(bf16, present), "format": "bf16"}],
        }

    def input_width(self, role: str, moe: Moe | None) -> int:
        hidden: Any = self.raw["model"]["hidden_size"]
        widths: dict[str, Any] = {
            "moe.experts.up": (moe.latent_size if moe else None) or hidden,
            "moe.experts.down": moe.intermediate_size if moe else 0,
            "mlp.up": hidden,
            "mlp.down": self.raw.get("mlp", {}).get("intermediate_size"),
        }
        width = widths[role]
        return width if type(width) is int else 0


def export_config(spec: Spec) -> dict[str, Any]:
    """Return the config.json of a spec, such that importing it gives an equal spec.

    Both pattern forms and `num_hidden_layers` are written, as some readers need each.
    """
    pattern = spec.model.pattern
    config: dict[str, Any] = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "dtype": "bfloat16",
        "num_hidden_layers": len(pattern),
        "hybrid_override_pattern": pattern.symbols,
        "layers_block_type": to_layers_block_type(pattern),
    }
    for path, (name, _, _) in FIELDS.items():
        table = getattr(spec, str(path[0]))
        if table is not None:
            config[name] = getattr(table, str(path[1]))
    ends = spec.model.eos_token_ids
    config["eos_token_id"] = None if not ends else ends[0] if len(ends) == 1 else list(ends)
    config |= {name: unused[0] for name, unused in UNSUPPORTED.items() if unused[0] is not None}
    if spec.moe is not None:
        config["n_shared_experts"] = 1 if spec.moe.shared_intermediate_size else 0
    config["mamba_ssm_cache_dtype"] = {ours: theirs for theirs, ours in _STATE_DTYPES.items()}[
        spec.serving.ssm_state_dtype
    ]
    config["num_nextn_predict_layers"] = 0 if spec.mtp is None else 1
    if spec.mtp is not None:
        config["mtp_hybrid_override_pattern"] = spec.mtp.pattern.symbols
        config["mtp_layers_block_type"] = to_layers_block_type(spec.mtp.pattern)
        config["mtp_num_layers"] = spec.mtp.depth
        config["mtp_loss_scaling_factor"] = spec.mtp.loss_scaling_factor
    config["n3c"] = _own(spec)
    return config


def _own(spec: Spec) -> dict[str, Any]:
    own: dict[str, Any] = {"name": spec.name}
    if spec.model.pattern.stages:
        own["pipeline_cuts"] = list(spec.model.pattern.stages)
    for name in ("quantization", "training"):
        table = getattr(spec, name)
        if table is not None:
            own[name] = plain_table(table)
    own["serving"] = plain_table(spec.serving)
    del own["serving"]["ssm_state_dtype"]  # it has a name of its own
    return own


def plain_table(table: Any) -> dict[str, Any]:
    """Return a table of a spec as plain JSON values; what is None is left out."""
    values = {field.name: getattr(table, field.name) for field in dataclasses.fields(table)}
    return {name: _plain_value(value) for name, value in values.items() if value is not None}


def _plain_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return plain_table(value)
    return [_plain_value(entry) for entry in cast("tuple[object, ...]", value)] if isinstance(value, tuple) else value


def _json(value: object) -> str:
    return shown(json.dumps(value))


def _short(pattern: Pattern) -> str:
    text = pattern.compact()
    return f"`{text}`" if len(text) <= 60 else f"{len(pattern)} blocks `{text[:40]}...`"
