"""Conversion of configs and checkpoint folders to specs, and of specs to configs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from n3c.ir.diagnostics import Diagnostic, Severity

from .dump import dump_spec
from .files import read_text
from .huggingface import export_config, import_config
from .huggingface_names import MTP
from .json_places import JsonPlaces, parse_json
from .modelopt import is_modelopt
from .modelopt_files import hf_quant_config
from .multimodal import other_models, text_config
from .schema import Spec


@dataclass(frozen=True, slots=True)
class Imported:
    """An imported spec: itself, its TOML text, and the warnings."""

    spec: Spec
    text: str
    warnings: tuple[Diagnostic, ...]


def run_import(source: Path, *, formats_matter: bool = True, with_mtp: bool = True) -> Imported:
    """Import a config.json, or a checkpoint folder with one and perhaps a hf_quant_config.json.

    Without `formats_matter` a quantization config of another layout than ModelOpt's is passed over, without `with_mtp`
    all that is said of multi-token prediction. Raises N3CError.
    """
    file = source / "config.json" if source.is_dir() else source
    config, places = parse_json(read_text(file), str(file))
    if not formats_matter and _is_foreign(config.get("quantization_config")):
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    if not with_mtp:
        config = _without_mtp(config)
    quantization, quantization_places = _quantization(file)
    told: list[Diagnostic] = []
    nested = text_config(config)
    if nested is not None:
        if quantization is None and config.get("quantization_config") is not None:
            beside = hf_quant_config(config, places)
            quantization, quantization_places = beside.table, places.below("quantization_config")
        told.append(_of_text_alone(nested[0], config, places))
        config, places = nested[1], places.below(nested[0])
    name = _name(_folder_name(source) if source.is_dir() else _stem(source))
    spec, warnings = import_config(config, places, name, quantization, quantization_places)
    text = dump_spec(spec)
    return Imported(spec, text, (*told, *warnings))


def _of_text_alone(name: str, config: Mapping[str, object], places: JsonPlaces) -> Diagnostic:
    others = ", ".join(f"`{other}`" for other in other_models(config)) or "no other model"
    message = f"the spec is that of the text model, `{name}`; not in it: {others}"
    return Diagnostic("W0305", message, places.json_key(name), Severity.WARNING)


def _without_mtp(config: Mapping[str, object]) -> Mapping[str, object]:
    """Return a config of the trunk alone; rules of its n3c tables that name roles of MTP alone go, too."""
    kept = {key: value for key, value in config.items() if key not in MTP}
    own = kept.get("n3c")
    if isinstance(own, dict):
        tables = cast("dict[str, object]", own)
        kept["n3c"] = tables | {
            name: _without_mtp_rules(tables[name]) for name in ("quantization", "training") if name in tables
        }
    return kept


def _without_mtp_rules(table: object) -> object:
    rules = cast("dict[str, object]", table).get("rules") if isinstance(table, dict) else None
    if not isinstance(rules, list):
        return table
    kept: list[object] = []
    for rule in cast("list[object]", rules):
        roles = cast("dict[str, object]", rule).get("roles") if isinstance(rule, dict) else None
        if isinstance(roles, list) and roles:
            left = [role for role in cast("list[object]", roles) if not str(role).startswith("mtp.")]
            if left:
                kept.append(cast("dict[str, object]", rule) | {"roles": left})
        else:
            kept.append(rule)
    return cast("dict[str, object]", table) | {"rules": kept}


def config_text(spec: Spec) -> str:
    """Return the config.json text of a spec. Raises N3CError."""
    return json.dumps(export_config(spec), indent=2) + "\n"


def _quantization(config_file: Path) -> tuple[Mapping[str, object] | None, JsonPlaces | None]:
    file = config_file.parent / "hf_quant_config.json"
    if config_file.name != "config.json" or not file.is_file():
        return None, None
    config, places = parse_json(read_text(file), str(file))
    return hf_quant_config(config, places).table, places


def _is_foreign(quantization: object) -> bool:
    return isinstance(quantization, dict) and not is_modelopt(cast("dict[str, object]", quantization))


def _stem(file: Path) -> str:
    """Return what a config file is called, or its folder where it is just `config.json`."""
    return _folder_name(file.parent) if file.name == "config.json" else file.stem


def _folder_name(folder: Path) -> str:
    """Return what a checkpoint folder is called; of a snapshot in the Hugging Face cache, what its repository is."""
    path = folder.absolute()
    if path.name in ("", "..") or _is_snapshot(path):
        path = path.resolve()
    return path.parents[1].name.rpartition("--")[2] if _is_snapshot(path) else path.name


def checkpoint_name(folder: Path) -> str:
    """Return what a checkpoint is called: `org/name` for a snapshot in the Hugging Face cache, else its folder."""
    path = folder.absolute()
    if _is_snapshot(path):
        return path.parents[1].name.removeprefix("models--").replace("--", "/", 1)
    return path.name


def _is_snapshot(path: Path) -> bool:
    """Whether a path is `models--org--name/snapshots/commit`."""
    return path.parent.name == "snapshots" and path.parents[1].name.startswith("models--")


def _name(text: str) -> str:
    """Return the nearest valid spec name."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:80] or "imported"
