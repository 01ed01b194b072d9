"""The shipped specs: published totals, patterns, and the JSON Schema."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from n3c.ir.source import tensor_names
from n3c.passes.lower.model import lower
from n3c.specs.block_kind import BlockKind
from n3c.specs.blocks import ATTENTION, KINDS, MAMBA, MLP
from n3c.specs.dump import dump_spec
from n3c.specs.json_schema import json_schema
from n3c.specs.load import load_spec, parse_spec
from n3c.specs.roles import match_roles, select_layers
from n3c.specs.schema import Spec

SPECS = Path(__file__).parents[2] / "specs"
NAMES = sorted(path.stem for path in SPECS.glob("*.toml"))
# The stubs of jsonschema leave types unknown.
VALIDATOR: Any = Draft202012Validator(json_schema())


def load(name: str) -> Spec:
    spec, warnings = load_spec(SPECS / f"{name}.toml")
    assert warnings == []
    return spec


def block_parameters(spec: Spec, kind: BlockKind) -> int:
    """Count a block's parameters by its dimensions, its norm included, the router's bias buffer not."""
    width = spec.model.hidden_size
    if kind is MAMBA and spec.mamba is not None:
        m = spec.mamba
        inner = m.num_heads * m.head_dim
        convolved = inner + 2 * m.n_groups * m.state_size
        projections = (inner + convolved + m.num_heads) * width + inner * width
        return width + projections + convolved * (m.conv_kernel + m.conv_bias) + 3 * m.num_heads + inner
    if kind is ATTENTION and spec.attention is not None:
        a = spec.attention
        return width + 2 * width * a.head_dim * (a.num_heads + a.num_kv_heads)
    if kind is MLP and spec.mlp is not None:
        return width + 2 * width * spec.mlp.intermediate_size
    assert spec.moe is not None
    e = spec.moe
    inside = e.latent_size or width
    latent = 2 * width * e.latent_size if e.latent_size else 0
    routed = e.num_experts * (width + 2 * inside * e.intermediate_size)
    return width + routed + latent + 2 * width * e.shared_intermediate_size


def parameters(spec: Spec) -> tuple[int, int]:
    """Return the parameters of the trunk, and of the MTP block."""
    width = spec.model.hidden_size
    ends = (1 if spec.model.tie_word_embeddings else 2) * spec.model.vocab_size * width + width
    trunk = ends + sum(block_parameters(spec, kind) for kind in spec.model.pattern)
    if spec.mtp is None:
        return trunk, 0
    return trunk, 2 * width * width + 3 * width + sum(block_parameters(spec, kind) for kind in spec.mtp.pattern)


@pytest.mark.parametrize(
    ("name", "trunk", "mtp"),
    [
        ("nano", 31_577_937_344, 0),
        ("super", 120_668_687_360, 2_942_324_736),
        ("ultra", 549_308_968_960, 11_215_609_856),
        ("nano-4b", 3_973_556_832, 0),
        ("nemotron-nano-9b-v2", 8_888_227_328, 0),
        ("nemotron-h-8b", 8_100_852_736, 0),
        ("lightning", 31_577_937_344, 1_335_325_824),
        ("nemotron-nano-12b-v2", 12_310_001_152, 0),
        ("nemotron-h-47b", 46_791_554_816, 0),
        ("nemotron-h-56b", 56_324_350_464, 0),
        ("tiny", 2_025_536, 428_672),
        ("tiny-moe", 2_449_600, 0),
    ],
)
def test_totals(name: str, trunk: int, mtp: int) -> None:
    assert parameters(load(name)) == (trunk, mtp)


@pytest.mark.parametrize(
    ("name", "reported"),
    [
        ("ultra", 549.3e9),
        ("nano-4b", 3.974e9),
        ("nemotron-nano-9b-v2", 8.888e9),
        ("nemotron-nano-12b-v2", 12.31e9),
        ("nemotron-h-8b", 8.101e9),
        ("nemotron-h-47b", 46.8e9),
        ("nemotron-h-56b", 56.3e9),
    ],
)
def test_totals_are_those_reported(name: str, reported: float) -> None:
    assert abs(parameters(load(name))[0] / reported - 1) < 1e-3


@pytest.mark.parametrize(
    ("name", "elements", "tensors"), [("super", 123_611_033_088, 42_683), ("lightning", 32_913_266_240, 6_513)]
)
def test_checkpoints_are_counted_as_published(name: str, elements: int, tensors: int) -> None:
    """With MTP and the routers' bias buffers: NVIDIA's verification cards of the released checkpoints."""
    parameters_ = lower(load(name)).parameters.values()
    assert sum(math.prod(parameter.type.static_dims) for parameter in parameters_) == elements
    assert sum(1 for parameter in parameters_ for _ in tensor_names(parameter.source)) == tensors


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("nano", "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"),
        ("super", "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"),
        (
            "ultra",
            "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*"
            "EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        ),
        ("nano-4b", "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"),
        ("nemotron-nano-9b-v2", "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"),
        ("nemotron-h-8b", "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"),
        ("lightning", "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"),
        ("nemotron-nano-12b-v2", "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"),
        (
            "nemotron-h-47b",
            "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-",
        ),
        (
            "nemotron-h-56b",
            "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-"
            "M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        ),
    ],
)
def test_patterns_are_the_published_ones(name: str, pattern: str) -> None:
    assert load(name).model.pattern.symbols == pattern


@pytest.mark.parametrize(
    ("name", "kv_bytes", "state_bytes"),
    [("nano", 6_144, 49_082_368), ("super", 8_192, 170_229_760), ("ultra", 12_288, 407_961_600)],
)
def test_states_are_the_published_ones(name: str, kv_bytes: int, state_bytes: int) -> None:
    spec = load(name)
    assert spec.attention is not None
    assert spec.mamba is not None
    heads = 2 * spec.attention.num_kv_heads * spec.attention.head_dim
    assert 2 * heads * len(spec.model.pattern.layers(ATTENTION)) == kv_bytes
    m = spec.mamba
    a_layer = 2 * m.conv_size * (m.conv_kernel - 1) + 4 * m.inner_size * m.state_size
    assert a_layer * len(spec.model.pattern.layers(MAMBA)) == state_bytes
    assert (spec.serving.kv_cache_dtype, spec.serving.ssm_state_dtype) == ("bf16", "fp32")


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_says_something(name: str) -> None:
    """Each glob matches a role that the model has, and each layer selector a layer that has such a role."""
    spec = load(name)
    tables = {kind: f"{kind.table}." for kind in KINDS}
    for table in (spec.quantization, spec.training):
        for rule in table.rules if table else ():
            for glob in rule.roles:
                if rule.layers != "all":
                    layers = select_layers(rule.layers, spec.model.pattern)
                    kinds = {spec.model.pattern.kinds[layer] for layer in layers}
                    assert any(role.startswith(tables[kind]) for kind in kinds for role in match_roles([glob]))
                elif glob == "mtp.*":
                    assert spec.mtp is not None
                elif glob not in ("embedding", "lm_head"):
                    assert any(glob.startswith(tables[kind]) for kind in spec.model.pattern)


def test_nano_4b_exceptions_are_mlps() -> None:
    spec = load("nano-4b")
    assert spec.quantization is not None
    modules = [module for rule in spec.quantization.rules for module in rule.modules]
    assert len(modules) == 9
    for module in modules:
        assert spec.model.pattern.kinds[int(module.split(".")[2])] is MLP


def test_tiny_weights_can_be_nvfp4() -> None:
    for name in ("tiny", "tiny-moe"):
        spec = load(name)
        assert spec.mamba is not None
        assert spec.moe is not None
        widths = [spec.model.hidden_size, spec.mamba.inner_size, spec.mamba.in_proj_size, spec.moe.intermediate_size]
        widths += [spec.moe.latent_size or 16, spec.moe.shared_intermediate_size]
        assert all(width % 16 == 0 for width in widths)


@pytest.mark.parametrize("name", NAMES)
def test_dump_loads_back(name: str) -> None:
    spec = load(name)
    text = dump_spec(spec)
    assert parse_spec(text, name)[0] == spec
    VALIDATOR.validate(tomllib.loads(text))


@pytest.mark.parametrize("name", NAMES)
def test_shipped_specs_fit_the_json_schema(name: str) -> None:
    VALIDATOR.validate(tomllib.loads((SPECS / f"{name}.toml").read_text(encoding="utf-8")))


def test_the_json_schema_is_one() -> None:
    Draft202012Validator.check_schema(VALIDATOR.schema)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("name",), "Bad Name"),
        (("schema",), 2),
        (("nonsense",), 1),
        (("model", "hidden_size"), 0),
        (("model", "hidden_size"), "4096"),
        (("model", "tie_word_embeddings"), 1),
        (("model", "norm_eps"), 0),
        (("model", "pattern"), ""),
        (("moe", "latent_dim"), 4),
        (("moe", "num_experts"), 10**30),
        (("quantization", "format"), "mxfp8"),
        (("quantization", "block"), [32, 32]),
        (("quantization", "rules"), [{"roles": ["*"]}]),
        (("quantization", "rules"), [{"format": "bf16"}]),
        (("quantization", "rules"), [{"format": "mxfp8", "roles": ["*"]}]),
        (("quantization", "rules"), [{"format": "bf16", "roles": ["*"], "layers": "some"}]),
        (("training", "rules"), [{"format": "fp8", "roles": ["*"]}]),
        (("serving", "batch_sizes"), [0]),
        (("serving", "kv_cache_dtype"), "int8"),
    ],
)
def test_the_json_schema_refuses(path: tuple[str, ...], value: Any) -> None:
    document = tomllib.loads((SPECS / "super.toml").read_text(encoding="utf-8"))
    VALIDATOR.validate(document)
    table = document
    for part in path[:-1]:
        table = table[part]
    table[path[-1]] = value
    assert not VALIDATOR.is_valid(document)
