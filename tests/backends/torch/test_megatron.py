"""The Megatron files: read, and their values taken, by Megatron-core's own code; `make test-oracles`.

Nothing is trained here: Megatron-core builds this model on CUDA only.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from n3c.specs.load import load_spec
from n3c.specs.schema import Spec
from support.specs import SPECS

from .generated import write_generated

pytestmark = pytest.mark.oracles

SHIPPED = sorted(SPECS.glob("*.toml"))
BRIDGE_ONLY = {
    *("hybrid_layer_pattern", "mamba_chunk_size", "position_embedding_type", "seq_length", "vocab_size"),
    *("share_embeddings_and_output_weights", "keep_mtp_spec_in_bf16"),
}
"""Fields that HybridModelProvider adds to Megatron-core's TransformerConfig."""


@pytest.fixture(scope="module")
def core() -> Iterator[types.SimpleNamespace]:
    """Return modules of Megatron-core, from its wheel, which `make test-oracles` unpacks but does not install."""
    folder = Path(sys.prefix) / "megatron"
    assert folder.is_dir(), "`make test-oracles` unpacks Megatron-core there"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        names = {
            "config": "transformer.transformer_config",
            "pattern": "models.hybrid.hybrid_layer_allocation",
            "quantization": "quantization.quant_config",
        }
        yield types.SimpleNamespace(
            **{name: importlib.import_module(f"megatron.core.{module}") for name, module in names.items()}
        )


@pytest.fixture(params=SHIPPED, ids=lambda path: path.stem)
def emitted(
    request: pytest.FixtureRequest, core: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Spec, Any]:
    """Return a spec and its megatron_provider.py, whose HybridModelProvider keeps what it is given."""
    spec = load_spec(request.param)[0]
    write_generated(spec, tmp_path)
    kept = types.ModuleType("kept")
    kept.__dict__["HybridModelProvider"] = dict
    for name in ("bridge", "bridge.models", "bridge.models.hybrid"):
        monkeypatch.setitem(sys.modules, f"megatron.{name}", types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "megatron.bridge.models.hybrid.hybrid_provider", kept)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "megatron_provider", raising=False)
    return spec, importlib.import_module("megatron_provider")


def test_values(emitted: tuple[Spec, Any], core: Any) -> None:
    """Megatron-core's own TransformerConfig accepts every value and derives nothing else of it."""
    spec, module = emitted
    values = module.provider(4096)
    fields = {field.name for field in dataclasses.fields(core.config.TransformerConfig)}
    assert values.keys() - fields <= BRIDGE_ONLY
    own = {name: value for name, value in values.items() if name in fields}
    own["moe_permute_fusion"] = False  # it asks for Transformer Engine
    config = core.config.TransformerConfig(num_layers=len(spec.model.pattern), **{"num_attention_heads": 1, **own})
    assert all(getattr(config, name) == value for name, value in own.items())
    if spec.moe is not None:
        assert (config.moe_latent_size, config.moe_router_topk) == (spec.moe.latent_size, spec.moe.top_k)
    assert config.mtp_num_layers == (spec.mtp.depth if spec.mtp else None)


def test_pattern(emitted: tuple[Spec, Any], core: Any) -> None:
    """Its own parser finds the spec's layers and prediction steps, however they are cut into stages."""
    spec, module = emitted
    for stages in (1, 2, 3):
        text = module.provider(4096, stages)["hybrid_layer_pattern"]
        parsed = core.pattern.parse_hybrid_pattern(text)
        assert parsed.main_pattern.replace("|", "") == spec.model.pattern.symbols
        assert core.pattern.get_hybrid_total_pipeline_segment_count(text) == stages
        found = (parsed.mtp_pattern, parsed.mtp_num_depths)
        assert found == ((spec.mtp.pattern.symbols, spec.mtp.depth) if spec.mtp else (None, 0))
        counts = core.pattern.get_hybrid_layer_counts(text)
        steps = spec.mtp.pattern.symbols * spec.mtp.depth if spec.mtp else ""
        assert {k: n for k, n in counts.items() if n} == {
            kind: (spec.model.pattern.symbols + steps).count(kind) for kind in set(spec.model.pattern.symbols + steps)
        }


@pytest.mark.parametrize("name", ["tiny", "super"])
def test_formats_of_modules(name: str, core: Any, tmp_path: Path) -> None:
    """Its own matchers give the modules of Megatron-core the formats of [training]."""
    write_generated(load_spec(SPECS / f"{name}.toml")[0], tmp_path)
    text = (tmp_path / "megatron_recipe.py").read_text()
    start, end = text.index("FORMATS = "), text.index("def precision")
    exceptions = text[text.index("def exceptions") : text.index("def pretrain_config")]
    scope: dict[str, Any] = {"RecipeConfig": core.quantization.RecipeConfig}
    exec(text[start:end] + exceptions.replace(" -> RecipeConfig", ""), scope)
    recipe = scope["exceptions"]()
    expected = {
        "decoder.layers.0.mixer.in_proj": None,
        "decoder.layers.0.mixer.out_proj": "mxfp8",
        "decoder.layers.7.self_attention.linear_qkv": "bf16",
        "decoder.layers.7.self_attention.linear_proj": "bf16",
        "decoder.layers.1.mlp.experts.linear_fc1": None,
        "decoder.layers.1.mlp.shared_experts.linear_fc2": None,
        "decoder.layers.1.mlp.fc1_latent_proj": "bf16",
        "decoder.layers.1.mlp.fc2_latent_proj": "bf16",
        "mtp.layers.1.eh_proj": "bf16",
        "mtp.layers.1.mtp_model_layer.layers.1.mlp.experts.linear_fc1": "bf16",
    }
    match = core.quantization.MatchContext
    found = {module: recipe.match_to_config_key(match(module, None)) for module in expected}
    assert found == expected
