"""The generated text: golden, formatted, typed, standalone, and deaf to hostile specs."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from n3c.backends.torch.context import spec_view
from n3c.backends.torch.emit import emit
from n3c.backends.torch.loading import write_files
from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.ir.op_definition import OPS
from n3c.specs.blocks import GENERAL_LETTERS, KINDS, Mamba, MoeLayers
from n3c.specs.load import load_spec
from n3c.specs.pattern import Pattern
from n3c.specs.schema import Model, Spec, Training
from support.golden import assert_golden
from support.specs import SPECS

from .generated import SHA256, generate, tiny_spec

SHIPPED = sorted(SPECS.glob("*.toml"))
BIG = 123_456_789_012
SUPER = "nemotron_3_super_120b_a12b"


def variants() -> dict[str, Spec]:
    """Return specs with every branch of the templates, and with very short and very long values."""
    tiny = tiny_spec()
    found = {
        "tiny": tiny,
        "standard": tiny_spec(latent_size=None, n_group=2, norm_topk_prob=False),
        "layers": tiny_spec(layers=(MoeLayers("1", top_k=1), MoeLayers("mtp", intermediate_size=16))),
        "unshared": tiny_spec("ME*", "E", shared_intermediate_size=0),
        "tied": replace(tiny, model=replace(tiny.model, tie_word_embeddings=True, rescale_prenorm_residual=False)),
        "long": replace(
            tiny,
            name="a" * 80,
            model=replace(
                tiny.model,
                pattern=Pattern.parse("(ME*-)30"),
                vocab_size=BIG,
                hidden_size=BIG,
                max_position_embeddings=BIG,
                norm_eps=1.2345678901234567e-100,
                initializer_range=1.2345678901234567e-100,
                pad_token_id=None,
                eos_token_ids=tuple(range(BIG, BIG + 12)),
            ),
            mamba=Mamba(
                BIG,
                BIG,
                BIG,
                BIG,
                BIG,
                BIG,
                conv_bias=False,
                time_step_min=1e-100,
                time_step_max=1.2345678901234567e100,
            ),
        ),
    }
    found["dense_mtp"] = tiny_spec("M*-", mtp="*-")
    found["emulated"] = replace(tiny, training=Training("nvfp4"))
    found["emulated_dense"] = replace(tiny_spec("M*-", mtp=None), training=Training("mxfp8"))
    for symbols in ("M", "*", "E", "-", "M*", "E-"):
        found[f"only_{''.join(hex(ord(s))[2:] for s in symbols)}"] = tiny_spec(symbols, mtp=None)
    return found


def run_tool(*arguments: str, cwd: Path | None = None) -> None:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_operations_of_a_token_and_of_its_context_have_a_place_each() -> None:
    view = spec_view(tiny_spec(), SHA256, (11, 22))
    assert (view.flops_per_token, view.flops_per_token_of_context) == ("11", "22")


def test_golden() -> None:
    for name, text in emit(replace(tiny_spec(), training=Training("nvfp4")), SHA256).items():
        assert_golden(f"torch/{name}", text)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    shipped = {path.stem.replace("-", "_"): load_spec(path)[0] for path in SHIPPED}
    for name, spec in (variants() | shipped).items():
        write_files(emit(spec, SHA256, (BIG, BIG)), folder / name)
    return folder


def test_formatted_and_clean(generated: Path) -> None:
    """Also the adapters for other trainers. Only imports of a package with a name of 80 letters are too long."""
    run_tool("ruff", "format", "--no-cache", "--isolated", "--check", "--diff", "--line-length", "100", str(generated))
    rules = "A,B,C4,D2,D3,D4,E,F,I,PERF,PIE,RUF,UP,W"
    style = "D203,D205,D212,D213,D400,D401,D415"
    options = ["--no-cache", "--isolated", "--line-length", "100", "--target-version", "py311"]
    options += ["--select", rules, "--ignore", style]
    ours = ["megatron_provider", *sorted({path.parent.name for path in generated.glob("*/*/__init__.py")})]
    options += ["--config", f"lint.isort.known-first-party = {ours}"]
    options += ["--per-file-ignores", "long/*.py:E501"]
    run_tool("ruff", "check", *options, ".", cwd=generated)


def test_typed(generated: Path, request: pytest.FixtureRequest) -> None:
    kept = getattr(request.config, "cache", None)  # absent under -p no:cacheprovider
    cache = kept.mkdir("mypy-generated") if kept else generated / "cache"
    for name in ("tiny", "standard", "unshared", "tied", "only_4d", "only_2a", "only_2d"):
        options = ["--strict", "--config-file", os.devnull, "--cache-dir", str(cache)]
        (package,) = (generated / name).glob("*/__init__.py")
        run_tool("mypy", *options, str(package.relative_to(generated / name)), cwd=generated / name)


@pytest.mark.parametrize(
    "name",
    [
        "tiny",
        "only_4d",
        "emulated",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("only_45", "emulated_dense")),
    ],
)
def test_train_is_typed(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Experts and MTP, experts, neither; and with numerics.py."""
    kept = getattr(request.config, "cache", None)  # absent under -p no:cacheprovider
    cache = kept.mkdir("mypy-generated") if kept else tmp_path / "cache"
    files = emit(variants()[name], SHA256)
    assert ("tiny_test/numerics.py" in files) == name.startswith("emulated")
    write_files(files, tmp_path)
    run_tool("mypy", "--strict", "--config-file", os.devnull, "--cache-dir", str(cache), "train.py", cwd=tmp_path)


def test_only_what_the_spec_has() -> None:
    files = emit(tiny_spec("M-", mtp=None), SHA256)
    text = files["tiny_test/model.py"] + files["tiny_test/state.py"]
    classes = {node.name for node in ast.parse(files["tiny_test/model.py"]).body if isinstance(node, ast.ClassDef)}
    assert {"Mamba2", "MLP", "Block", "Backbone", "Model", "Config"} <= classes
    assert not {"Attention", "MoE", "Router", "Experts", "MTP"} & classes
    assert not any(word in text for word in ("q_proj", "expert", "keys:", "mtp_depth", "topk"))
    assert not {"tiny_test/grouped.py", "tiny_test/balance.py"} & files.keys()


def test_the_model_reads_from_top_to_bottom() -> None:
    """Config, the mixers in the order of the symbols, Block, Model: the architecture alone, in about 650 lines."""
    text = emit(tiny_spec(), SHA256)["tiny_test/model.py"]
    classes = [node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    wanted = ["Config", "Mamba2", "Router", "Experts", "MoE", "Attention", "MLP", "Block", "Backbone", "MTP", "Model"]
    assert [name for name in classes if name in wanted] == wanted
    assert len(emit(load_spec(SPECS / "super.toml")[0], SHA256)[f"{SUPER}/model.py"].splitlines()) <= 680


def test_every_letter_of_a_shape_is_in_the_table() -> None:
    """`# [B, S, H * P]`, or `x [T, L]` in a docstring: letters of specs/blocks.py, in ops too, or words."""
    tables = [GENERAL_LETTERS, *(kind.letters for kind in KINDS)]
    known = {letter for table in tables for letter in table}
    assert sum(map(len, tables)) == len(known), "a letter has two meanings"
    texts = {name: text for name, text in emit(variants()["emulated"], SHA256).items() if name.endswith(".py")}
    texts |= {name: definition.doc for name, definition in OPS.items()}
    for name, text in texts.items():
        comments = [part for line in text.splitlines() for part in line.partition("#")[2:]]
        documented = _documented(text) if name.endswith(".py") else []
        documentation = [ast.get_docstring(node) or "" for node in documented] or [text]
        for shape in re.findall(r"\[([^\]\[]*)\]", "\n".join([*comments, *documentation])):
            letters = set(re.findall(r"(?<![\w.`'\"])[A-Z](?![\w.`'\"])", shape))
            assert letters <= known, f"{name}: [{shape}]"


def _documented(text: str) -> list[Any]:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]


def test_header_and_imports() -> None:
    files = emit(tiny_spec(), SHA256)
    header = "# Generated by n3c. Do not edit: change the spec and build again.\n# spec: tiny-test\n"
    assert all(text.startswith(f"{header}# sha256: {SHA256}\n") for name, text in files.items() if name.endswith(".py"))
    imported = {
        (alias.name if isinstance(node, ast.Import) else str(node.module)).split(".")[0]
        for name, text in files.items()
        if name.startswith("tiny_test/") and name.removeprefix("tiny_test/") not in ("modeling_n3c.py", "callbacks.py")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level)
        for alias in node.names
    }
    own = {"torch", "safetensors", "filelock", "jinja2"}  # two of them are torch's own
    assert imported - set(sys.stdlib_module_names) == own | {"rich", "triton"}  # where they are installed


def test_runs_where_there_is_no_n3c(tmp_path: Path) -> None:
    write_files(emit(tiny_spec(), SHA256), tmp_path)
    program = """
import sys
sys.modules["n3c"] = None
sys.path.insert(0, sys.argv[1])
import torch, tiny_test
torch.manual_seed(0)
net = tiny_test.Model(tiny_test.Config()).eval()
ids = torch.arange(10).view(2, 5)
out = net(ids, labels=ids)
out.loss.backward()
state = net.allocate_state(2, 5)
logits = torch.cat([net.step(ids[:, :3], state), net.step(ids[:, 3:4], state), net.step(ids[:, 4:], state)], 1)
assert (logits - out.logits).abs().max() < 1e-5
tiny_test.save_checkpoint(net, sys.argv[1] + "/saved")
tiny_test.load_checkpoint(net, sys.argv[1] + "/saved")
print(tuple(out.logits.shape))
"""
    command = [sys.executable, "-I", "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("(2, 5, 97)\n", 0), done.stderr


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_specs(path: Path) -> None:
    """Every shipped spec gives a model; the released ones on the meta device, by their known counts."""
    spec = load_spec(path)[0]
    with torch.device("meta"):
        model = generate(spec).Model()
    counts = {"nano": 31_577_937_344, "super": 120_668_687_360}
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("mtp."))
    assert count == counts.get(path.stem, count)
    assert model.config.pattern == spec.model.pattern.symbols
    if path.stem.startswith("tiny"):
        model.to_empty(device="cpu").init_weights()
        out = model(torch.arange(8).view(1, 8), labels=torch.arange(8).view(1, 8))
        assert abs(out.logits.std().item() - 0.25) < 0.25 and torch.isfinite(out.loss)


def test_config_json() -> None:
    config = json.loads(emit(tiny_spec(), SHA256)["config.json"])
    assert config["model_type"] == "nemotron_h" and config["hybrid_override_pattern"] == "MEM*E-ME"


def test_text_depends_on_the_spec_alone() -> None:
    assert emit(tiny_spec(), SHA256) == emit(dataclasses.replace(tiny_spec()), SHA256)


class Sneaky(int):
    """A number that prints as code."""

    def __repr__(self) -> str:
        return "0; import os"

    __str__ = __format__ = __repr__  # type: ignore[assignment]


HOSTILE = '"""\n"]; import os; os.system("touch /tmp/owned") #'


def model_with(**change: Any) -> Spec:
    return replace(tiny_spec(), model=replace(tiny_spec().model, **change))


@pytest.mark.parametrize(
    "spec",
    [
        replace(tiny_spec(), name=HOSTILE),
        replace(tiny_spec(), name="ok\n"),
        replace(tiny_spec(), name=""),
        replace(tiny_spec(), name="{{ 7 * 7 }}"),
        model_with(hidden_size=HOSTILE),
        model_with(hidden_size=Sneaky(64)),
        model_with(norm_eps=float("inf")),
        model_with(norm_eps=HOSTILE),
        model_with(eos_token_ids=(1, HOSTILE)),
        model_with(pattern=Pattern('M"')),
        model_with(pattern=Pattern("")),
        replace(tiny_spec(), moe=None),
        replace(tiny_spec(), mamba=Mamba(HOSTILE, 1, 1, 1)),  # type: ignore[arg-type]
    ],
    ids=str,
)
def test_hostile_specs_are_refused(spec: Spec) -> None:
    with pytest.raises(N3CError) as caught:
        emit(spec, SHA256)
    assert caught.value.exit_code is ExitCode.SPEC
    assert [diagnostic.code for diagnostic in caught.value.diagnostics] == ["E0510"]


@pytest.mark.parametrize(
    ("name", "package"), [("a-b.c_d", "a_b_c_d"), ("3b", "m_3b"), ("nemotron-3-super", "nemotron_3_super"), ("x", "x")]
)
def test_name_of_the_package(name: str, package: str) -> None:
    files = emit(replace(tiny_spec(), name=name), SHA256)
    assert f"{package}/model.py" in files and f"from {package} import" in files["train.py"]


@pytest.mark.parametrize("name", ["torch", "safetensors", "json", "class", "train"])
def test_names_that_python_has_for_something_else_are_refused(name: str) -> None:
    with pytest.raises(N3CError) as caught:
        emit(replace(tiny_spec(), name=name), SHA256)
    assert [diagnostic.code for diagnostic in caught.value.diagnostics] == ["E0510"]


def test_a_hash_that_is_none_is_refused() -> None:
    with pytest.raises(N3CError):
        emit(tiny_spec(), "0" * 63 + '"')


def test_model_with_default_keys() -> None:
    """Optional keys left out of a spec still give whole code."""
    spec = Spec("m", Model(hidden_size=8, vocab_size=5, pattern=Pattern("M")), mamba=Mamba(2, 4, 4, 1))
    model = generate(spec).Model()
    assert model(torch.zeros(1, 3, dtype=torch.int64)).logits.shape == (1, 3, 5)
