"""The adapters to other engines: golden, formatted, typed, and what Megatron's cannot say."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from n3c.backends.torch.emit import emit
from n3c.backends.torch.engines import VERSIONS, engine_files
from n3c.backends.torch.loading import write_files
from n3c.backends.torch.megatron import gaps, precision
from n3c.specs.blocks import Mamba
from n3c.specs.load import load_spec
from n3c.specs.pattern import Pattern
from n3c.specs.schema import Rule, Spec, Training
from support.command import n3c
from support.golden import assert_golden
from support.specs import SPECS

from .generated import SHA256, generate, tiny_spec
from .test_emit import run_tool

ROOT = SPECS.parent
MEGATRON = {"megatron_provider.py", "megatron_recipe.py"}
UNTYPED = """
[mypy]
[mypy-torchtitan.*,megatron.*]
ignore_missing_imports = True
[mypy-torchtitan_adapter]
disallow_subclassing_any = False
"""
TINY = load_spec(SPECS / "tiny.toml")[0]


def test_golden() -> None:
    files = emit(TINY, SHA256)
    for name in engine_files(TINY):
        assert_golden(f"torch/engines/{name}", files[name])


@pytest.mark.parametrize(
    "spec", [pytest.param(TINY, id="all"), pytest.param(tiny_spec("M*-", mtp=None), marks=pytest.mark.slow, id="dense")]
)
def test_typed(spec: Spec, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Strictly typed, but for what comes from torchtitan and Megatron, which have no types."""
    kept = getattr(request.config, "cache", None)  # absent under -p no:cacheprovider
    cache = kept.mkdir("mypy-generated") if kept else tmp_path / "cache"
    write_files(emit(spec, SHA256), tmp_path)
    (tmp_path / "mypy.ini").write_text(UNTYPED)
    options = ["--strict", "--config-file", "mypy.ini", "--cache-dir", str(cache)]
    run_tool("mypy", *options, *engine_files(spec), cwd=tmp_path)


def test_versions_are_those_that_are_tested() -> None:
    pinned = (ROOT / "constraints-oracles.txt").read_text().split()
    assert {f"{name}=={VERSIONS[name]}" for name in ("torch", "torchtitan", "triton")} <= {*pinned}
    assert f"megatron-core=={VERSIONS['core']}" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("spec", [tiny_spec(), tiny_spec("M*-", mtp=None)], ids=["all", "dense"])
def test_weight_decay_is_that_of_train_py(spec: Spec) -> None:
    """The adapter's pattern over names means the rule of optimizer.py: matrices decay, embeddings do not."""
    text = emit(spec, SHA256)["torchtitan_adapter.py"]
    found = [
        node.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "plain"
    ]
    plain = re.compile(ast.literal_eval(found[0]))
    with torch.device("meta"):
        parameters = dict(generate(spec).Model().named_parameters())
    assert {name for name in parameters if plain.search(name)} == {
        name for name, p in parameters.items() if p.dim() < 2 or name.endswith("embeddings.weight")
    }


def test_of_a_bf16_spec_no_layer_is_named() -> None:
    found = precision(replace(tiny_spec(), training=None))
    assert (found.format, found.first, found.last, found.matchers) == ("bf16", 0, 0, ())


def test_precision() -> None:
    """The rules of the shipped specs are those of NVIDIA's own recipe for Super."""
    found = precision(load_spec(SPECS / "super.toml")[0])
    assert (found.format, found.first, found.last, found.mtp_in_bf16) == ("nvfp4", 0, 14, True)
    assert dict(found.matchers) == {
        "mtp.*": "bf16",
        "*mixer.out_proj": "mxfp8",
        "*mlp.fc1_latent_proj": "bf16",
        "*mlp.fc2_latent_proj": "bf16",
        "*.linear_qkv": "bf16",
        "*.linear_proj": "bf16",
    }


def test_precision_of_rules_only() -> None:
    """Low precision that only rules ask for, in MTP too."""
    rules = (Rule("mxfp8", roles=("moe.experts.*", "mtp.moe.experts.*")),)
    found = precision(replace(tiny_spec(), training=Training("bf16", rules=rules)))
    assert (found.format, found.mtp_in_bf16) == ("mxfp8", False)
    matchers = dict(found.matchers)
    assert matchers["mtp.*mlp.experts.linear_fc1"] == "mxfp8" and matchers["mtp.*.linear_qkv"] == "bf16"
    assert matchers["*mixer.in_proj"] == "bf16" and "*mlp.experts.linear_fc1" not in matchers
    assert list(matchers).index("mtp.*.linear_qkv") < list(matchers).index("*.linear_qkv")


@pytest.mark.parametrize("block", [(16, 16), (1, 16)])
def test_megatron_is_told_the_ingredients_of_train_py(block: tuple[int, int]) -> None:
    """What the recipe has Transformer Engine read is what the emulation beside it does."""
    spec = load_spec(SPECS / "super.toml")[0]
    assert spec.training is not None
    files = emit(replace(spec, training=replace(spec.training, block=block)), SHA256)
    (numerics,) = (text for name, text in files.items() if name.endswith("/numerics.py"))
    told = dict(re.findall(r'"NVTE_NVFP4_(DISABLE_\w+)": (\d),', files["megatron_recipe.py"]))
    done = dict(re.findall(r"^(DISABLE_\w+) = (\w+)", numerics, re.MULTILINE))
    assert len(told) == 3
    assert {name: bool(int(value)) for name, value in told.items()} == {name: done[name] == "True" for name in told}


def test_stages_of_the_pattern() -> None:
    spec = tiny_spec()
    cut = replace(spec, model=replace(spec.model, pattern=Pattern.parse("MEM* | E-ME")))
    text = emit(cut, SHA256)["megatron_provider.py"]
    assert 'PATTERN = "MEM*|E-ME/*E/*E"' in text and "STAGES = 2" in text


def trained(format_: Any, *rules: Rule) -> Spec:
    bf16 = Rule("bf16", roles=("lm_head",))
    return replace(tiny_spec(), training=Training(format_, rules=(bf16, *rules)))


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        (replace(tiny_spec(), mamba=Mamba(8, 16, 16, 2, conv_kernel=3)), "4 taps"),
        (tiny_spec(norm_topk_prob=False), "top_k > 1"),
        (tiny_spec(top_k=1), "top_k > 1"),
        (tiny_spec(n_group=2, topk_group=1), "model.py by two"),
        (replace(tiny_spec(), training=Training("nvfp4")), "output layer"),
        (trained("nvfp4", Rule("bf16", roles=("attention.q_proj",))), "linear_qkv"),
        (trained("nvfp4", Rule("bf16", roles=("*",), layers="4")), "one format"),
        (trained("nvfp4", Rule("nvfp4", roles=("mlp.*",), block=(1, 16))), "blocks of one shape"),
    ],
)
def test_gaps(spec: Spec, word: str) -> None:
    found = gaps(spec)
    assert [word in gap for gap in found] == [True]
    assert not MEGATRON & emit(spec, SHA256).keys()
    assert "torchtitan_adapter.py" in emit(spec, SHA256)


def test_no_gaps() -> None:
    for spec in (tiny_spec(), tiny_spec(n_group=2, topk_group=1, top_k=2), trained("mxfp8")):
        assert gaps(spec) == []
        assert emit(spec, SHA256).keys() >= MEGATRON


def test_gaps_are_warned_of(tmp_path: Path) -> None:
    command = ["build", SPECS / "tiny.toml", "--target", "torch", "-o", tmp_path / "out", "--json"]
    done = n3c(*command, "--set", "moe.norm_topk_prob=false")
    assert (done.code, done.codes) == (0, ["W0519"])
    files = {file["path"] for file in done.data["files"]}
    assert "torch/torchtitan_adapter.py" in files and "torch/megatron_recipe.py" not in files
