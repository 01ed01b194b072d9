"""A nemotron_h config.json to a spec: what `import_config` of `huggingface` does."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Severity, Span

from .huggingface_blocks import MTP as MTP_BLOCKS
from .huggingface_blocks import TRUNK, BlockConfigs, block_types, read_blocks
from .huggingface_names import (
    MTP,
    MTP_PATTERN_LISTS,
    N3C_KEYS,
    PATTERN_LISTS,
    PATTERNS,
    SILENT,
    STATE_DTYPES,
    TIME_STEP_MIN,
    UNSUPPORTED,
    config_fields,
)
from .json_places import JsonPlaces
from .modelopt_files import HfQuantConfig, SaidFormats
from .modules import module_groups, readable_sizes
from .multimodal import TEXT_MODELS
from .pattern import (
    MAX_BLOCKS,
    Pattern,
    PatternError,
    from_hybrid_override,
    from_layers_block_type,
    to_megatron,
)
from .places import Path, shown
from .reader import in_order, read_spec
from .recipe import published_recipe
from .rules_table import spec_with_quantization
from .schema import Mtp, Spec

MAY_BE_NULL = ("pad_token_id", "bos_token_id", "moe_latent_size")
"""Fields of the config that are null where the spec leaves its key out."""


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
        self.config = {
            name: value for name, value in config.items() if not (name in (TRUNK, MTP_BLOCKS) and value == [])
        }
        self.places = places
        self.blocks = BlockConfigs()
        self.found: list[Diagnostic] = []
        self.raw: dict[str, Any] = {"schema": 1, "model": {}}
        self.assumed: list[str] = []
        """Fields that the config lacks, with the values that are taken."""

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
            self.blocks = read_blocks(self.config, main, mtp, self.places, self.error)
            self.config |= self.blocks.common
            self.fields(main, mtp, own)
            self.layers(own)
        self.unsupported()
        self.tell_assumed()
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
        if not self.blocks.agree(spec):
            message = f"`n3c.moe_layers` and `{TRUNK}` give MoE blocks other sizes"
            self.error("E0303", message, self.places.json_key("n3c", "moe_layers"), "remove one of them")
            raise self.failure()
        if "quantization" not in self.raw and "n3c" not in self.config:
            recipe = published_recipe(spec)
            spec = spec_with_quantization(spec, recipe.table)
            self.found.append(recipe.note(self.places.start))
        return spec, self.found

    def failure(self) -> N3CError:
        return N3CError(in_order(self.found, self.places.start.file), ExitCode.SPEC)

    # What model this is

    def model_type(self) -> None:
        kind = self.config.get("model_type")
        if kind not in TEXT_MODELS:
            message = "missing `model_type`" if kind is None else f"`model_type` is `{shown(str(kind))}`"
            self.error("E0302", f"{message}: not a nemotron_h config", self.places.json_value("model_type"))

    def own(self) -> Mapping[str, Any]:
        """Return the `n3c` object."""
        own = self.config.get("n3c", {})
        if not isinstance(own, dict):
            self.error("E0302", "`n3c` must be an object", self.places.json_value("n3c"))
            return {}
        for name in cast("dict[str, object]", own):
            if name not in N3C_KEYS:
                message = f"unknown key `{shown(name)}` in `n3c`"
                self.error("E0302", message, self.places.json_key("n3c", name), f"known: {', '.join(N3C_KEYS)}")
        for name in ("name", "quantization", "training", "serving"):
            self.places.names[(name,)] = ("n3c", name)
        return cast("dict[str, Any]", own)

    # Patterns

    def pattern(self) -> Pattern | None:
        before = len(self.found)
        main = self.agreed((*PATTERN_LISTS, TRUNK), "hybrid_override_pattern")
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
                entries = cast("list[object]", raw)
                types = block_types(entries) if name in (TRUNK, MTP_BLOCKS) else [str(entry) for entry in entries]
                if types is not None:
                    return from_layers_block_type(types)
            if isinstance(raw, str) and "hybrid" in name:
                return from_hybrid_override(raw)
        except PatternError as error:
            span = self.places.json_inside((name,), error.offset, error.length)
            self.error("E0108", f"`{name}`: {error.message}", span, error.advice)
            return None
        wanted = "a string" if "hybrid" in name else "a list of names"
        wanted = "a list of objects, each with `block_type`" if name in (TRUNK, MTP_BLOCKS) else wanted
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
        pattern = self.agreed((*MTP_PATTERN_LISTS, MTP_BLOCKS), "mtp_hybrid_override_pattern")
        if pattern is None and len(self.found) > before:
            return None
        if pattern is None:
            pattern = Pattern.parse("*E")
            self.assume("mtp_hybrid_override_pattern", pattern.symbols)
        self.places.names.setdefault(("mtp",), ("num_nextn_predict_layers",))
        table: dict[str, object] = {"pattern": pattern.symbols}
        self.raw["mtp"] = table
        for key, name in (("depth", "mtp_num_layers"), ("loss_scaling_factor", "mtp_loss_scaling_factor")):
            if self.config.get(name) is not None:
                table[key] = self.config[name]
                self.places.names["mtp", key] = (name,)
            else:
                self.assume(name, getattr(Mtp, key))
        return pattern

    def assume(self, name: str, value: object) -> None:
        self.assumed.append(f"{name} {_json(value)}")

    def tell_assumed(self) -> None:
        if self.assumed:
            self.warn("W0302", f"not given, so taken by default: {', '.join(self.assumed)}", self.places.start)

    # Sizes

    def fields(self, main: Pattern, mtp: Pattern | None, own: Mapping[str, Any]) -> None:
        tables = {"model"} | {kind.table for kind in (*main, *(mtp or ()))}
        for path, (name, default, aliases) in config_fields().items():
            table, key = str(path[0]), str(path[1])
            if table not in tables:
                continue
            spelling = self.spelling(name, aliases)
            if spelling is None:
                self.assume(name, default)
            else:
                self.places.names[path] = self.blocks.origins.get(spelling, (spelling,))
            value = self.value(path, default if spelling is None else self.config[spelling], own)
            if value is not None or name not in MAY_BE_NULL:
                self.raw.setdefault(table, {})[key] = value
        if "mamba" in tables and self.config.get("mamba_ssm_cache_dtype") is None and "n3c" not in self.config:
            self.assume("mamba_ssm_cache_dtype", "float32")

    def layers(self, own: Mapping[str, Any]) -> None:
        """Take [[moe.layers]] of the spec's own words, or else of the blocks."""
        if "moe" in self.raw and "moe_layers" in own:
            self.raw["moe"]["layers"] = own["moe_layers"]
            self.places.names["moe", "layers"] = ("n3c", "moe_layers")
        elif self.blocks.entries:
            self.raw["moe"]["layers"] = self.blocks.entries
            self.places.names |= self.blocks.places

    def spelling(self, name: str, aliases: Iterable[str]) -> str | None:
        """Return the first name of a field that the config has, or None; E0303 where another one has another value."""
        given = [alias for alias in (name, *aliases) if alias in self.config]
        for alias in given[1:]:
            if self.config[alias] != self.config[given[0]]:
                first, second = shown(str(self.config[given[0]])), shown(str(self.config[alias]))
                self.error(
                    "E0303", f"`{alias}` is {second}, but `{given[0]}` is {first}", self.places.json_value(alias)
                )
        return given[0] if given else None

    def value(self, path: Path, value: Any, own: Mapping[str, Any]) -> Any:
        """Return the value of a spec's key for that of the config: they mean the same but for three keys."""
        match path:
            case ("mamba", "time_step_min") if TIME_STEP_MIN in own:  # weights that n3c saved
                self.places.names[path] = ("n3c", TIME_STEP_MIN)
                return own[TIME_STEP_MIN]
            case ("attention", "num_kv_heads") if value is None:
                return self.raw["attention"].get("num_heads")
            case ("model", "eos_token_ids"):
                return [] if value is None else value if isinstance(value, list) else [value]
            case _:
                return value

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
        known = {name for name, _, aliases in config_fields().values() for name in (name, *aliases)}
        known |= {*UNSUPPORTED, *PATTERNS, *MTP, *SILENT, "n_shared_experts", "mamba_ssm_cache_dtype"}
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
                if state not in list(STATE_DTYPES):
                    message = f"`mamba_ssm_cache_dtype` is {_json(state)}: not supported"
                    advice = f"supported: {', '.join(STATE_DTYPES)}"
                    self.error("E0304", message, self.places.json_value("mamba_ssm_cache_dtype"), advice)
                table["ssm_state_dtype"] = STATE_DTYPES.get(str(state), "fp32")
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
        tied = self.raw["model"].get("tie_word_embeddings") is True
        groups = module_groups(main, mtp, readable_sizes(self.raw), tied)
        beside = None if quantization is None else HfQuantConfig(quantization, places)
        try:
            said = SaidFormats.of(self.config, self.places, beside)
            if said is None or "quantization" in own:
                return  # where there are two, `n3c` has the spec's own words, from which a quantizer made the other
            imported = said.read(groups, main)
        except N3CError as error:
            self.found += error.diagnostics
            return
        self.raw["quantization"] = imported.table
        if imported.kv_cache_dtype is not None and "serving" not in own:
            self.raw.setdefault("serving", {})["kv_cache_dtype"] = imported.kv_cache_dtype
        if imported.unknown:
            first = shown(imported.unknown[0])
            message = f"{len(imported.unknown)} names of the quantization match no module, as `{first}`"
            self.warn("W0303", message, said.place)


def _json(value: object) -> str:
    return shown(json.dumps(value))


def _short(pattern: Pattern) -> str:
    text = pattern.compact()
    return f"`{text}`" if len(text) <= 60 else f"{len(pattern)} blocks `{text[:40]}...`"
