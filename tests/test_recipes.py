"""The recipes of CONTRIBUTING.md, followed to the letter on a copy of the repository.

Each test edits the files that its recipe names, no more and no fewer, and runs tests of the copy on what came of it.
The block kind is the gated MLP of Llama, `down(silu(gate(x)) * up(x))`, which the product does not have; the op is what
it needs, and the pass does nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from n3c.ir.extensions import GROUPS
from support.copies import writable_copy

ROOT = Path(__file__).parents[1]
COPIED = ("backends", "compiler", "docs", "ir", "passes", "runtime", "specs", "tests", "typings")


class Copy:
    """A copy of the repository, whose folders are the packages of its own Python processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.edited: set[str] = set()
        for name in COPIED:
            writable_copy(ROOT / name, root / name)
        shutil.copyfile(ROOT / "pyproject.toml", root / "pyproject.toml")

    def create(self, path: str, text: str) -> None:
        """Write a new file."""
        self.edited.add(path)
        assert not (self.root / path).exists()
        (self.root / path).write_text(text, encoding="utf-8")

    def insert(self, path: str, line: str, text: str) -> None:
        """Put `text` in front of the only line that begins with `line`."""
        self.edited.add(path)
        lines = (self.root / path).read_text(encoding="utf-8").splitlines(keepends=True)
        (index,) = [index for index, found in enumerate(lines) if found.startswith(line)]
        (self.root / path).write_text("".join([*lines[:index], text, *lines[index:]]), encoding="utf-8")

    def replace(self, path: str, old: str, new: str) -> None:
        """Put `new` in the place of `old`, which is there once."""
        self.edited.add(path)
        text = (self.root / path).read_text(encoding="utf-8")
        assert text.count(old) == 1
        (self.root / path).write_text(text.replace(old, new), encoding="utf-8")

    def append(self, path: str, text: str) -> None:
        """Put `text` behind all others."""
        self.edited.add(path)
        with (self.root / path).open("a", encoding="utf-8") as file:
            file.write(text)

    def python(self, *arguments: str) -> str:
        """Run Python on the copy; return what it printed."""
        environment = {**os.environ, "PYTHONPATH": str(self.root / "typings"), "N3C_UPDATE_GOLDEN": "1"}
        command = [sys.executable, *arguments]
        ran = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    def test(self, *arguments: str) -> None:
        """Lint the edited files, and run tests of the copy."""
        self.python("-m", "ruff", "check", "--no-cache", *sorted(path for path in self.edited if path.endswith(".py")))
        self.python("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


def files_of_recipe(heading: str, name: str) -> set[str]:
    """Return the files that a recipe names, those of optional steps (`If …`) left out."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    steps = [step for step in re.split(r"^\d+\. ", section, flags=re.MULTILINE)[1:] if not step.startswith("If ")]
    return {path.replace("NAME", name) for step in steps for path in re.findall(r"`([\w/-]+\.\w+)`", step)}


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


OP = '''
@op()
def swiglu(gate: TensorType, up: TensorType) -> TensorType:
    """y[n] = silu(gate[n]) * up[n], silu(x) = x * sigmoid(x) (arXiv 2002.05202): f32 [B, S, N] each."""
    require(gate == up, f"gate {gate} is not as up {up}")
    return gate
'''

MEANING = """
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


"""

SPELLING = '''

def swiglu(emitter: Emitter, node: Node) -> None:
    """Sigmoid and two products."""
    gate, up = emitter.operand(node, "gate"), emitter.operand(node, "up")
    emitter.bind(node.results[0], emitter.graph.node("Mul", silu(emitter, gate), up))
'''

SPELLING_TEST = """

def test_swiglu() -> None:
    one = OneOp()
    compare(one, one.apply(ops.swiglu, one.input("gate", 2, 3, 8), one.input("up", 2, 3, 8)))
"""


def add_op(copy: Copy) -> None:
    copy.append("ir/ops.py", OP)
    copy.insert("runtime/engines/reference/ops.py", "def concat(", MEANING.lstrip())
    copy.insert("runtime/engines/reference/ops.py", "        concat,", "        swiglu,\n")
    copy.append("backends/onnx/spellings/elementwise.py", SPELLING)
    copy.replace("backends/onnx/registry.py", "relu2, shift_left, split\n", "relu2, shift_left, split, swiglu\n")
    copy.insert("backends/onnx/registry.py", "        write_cache,", "        swiglu,\n")
    refused = '    (ops.swiglu, [X, t("B", "S", 9)], {}, "is not as up"),\n'
    copy.insert("tests/ir/test_ops.py", "    (ops.linear, [X, None]", refused)
    copy.append("tests/backends/onnx/test_spellings.py", SPELLING_TEST)


def test_add_an_op(copy: Copy) -> None:
    add_op(copy)
    assert copy.edited == files_of_recipe("Add an op", "swiglu")
    copy.test("tests/ir/test_ops.py", "tests/backends/onnx/test_spellings.py", "-k", "swiglu or every_op")


COMMAND = '''"""n3c hello: greet."""

from __future__ import annotations

from n3c.compiler.cli import options
from n3c.compiler.cli.command import n3c_command
from n3c.compiler.cli.output import print_json, say, suggest


@n3c_command("hello", "Greet.", examples=(("everybody", "n3c hello"),))
@options.common
def command(as_json: bool) -> None:
    """Greet."""
    print_json({"hello": "world"}) if as_json else say("hello")
    suggest(("specs",))
'''


@pytest.mark.slow
def test_add_a_command(copy: Copy) -> None:
    copy.create("compiler/cli/commands/hello.py", COMMAND)
    copy.insert("compiler/cli/main.py", '        "passes":', '        "hello": "Greet.",\n')
    copy.append("docs/command-line.md", "\n## n3c hello\n\nGreets.\n\nJSON: `hello`.\n")
    copy.insert("tests/compiler/cli/test_watch.py", '    "passes":', '    "hello": [""],\n')
    assert copy.edited == files_of_recipe("Add a command", "hello")
    copy.test(
        "tests/compiler/cli/test_help.py", "tests/compiler/cli/test_cli.py", "tests/compiler/test_documents.py",
        "tests/compiler/cli/test_watch.py", "tests/test_reference_pages.py", "-k", "hello or every_command or options",
    )  # fmt: skip
    assert "### n3c hello" in (copy.root / "docs/reference/options.md").read_text(encoding="utf-8")


PASS = '''"""pause: change nothing.

Pattern: none. Anywhere in the order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from n3c.ir.program import Program


@dataclass(frozen=True, slots=True)
class Pause:
    """Do nothing."""

    name: ClassVar[str] = "pause"

    def run(self, program: Program) -> bool:
        """Return that nothing changed."""
        return False
'''

TWIN = '''

def test_pause_changes_nothing(spec: Spec, checkpoint: Checkpoint) -> None:
    """The pipeline runs it, and says that it changed nothing."""
    program = lower(spec)
    before = forward(program, checkpoint)
    assert not Pause().run(program)
    assert all(torch.equal(a, b) for a, b in zip(before, forward(program, checkpoint), strict=True))
    assert {report.name: report.changed for report in serve(spec).reports}["pause"] is False
'''


@pytest.mark.slow
def test_add_a_pass(copy: Copy) -> None:
    copy.create("passes/pause.py", PASS)
    copy.insert("passes/pipelines.py", "from .plan_state", "from .pause import Pause\n")
    place = "    # anywhere, as it changes nothing\n    Stage(Pause, lambda *_: Pause()),\n"
    copy.insert("passes/pipelines.py", "    # after plan_state: the dispatch", place)
    copy.insert("tests/passes/test_twins.py", "from n3c.passes.pipelines ", "from n3c.passes.pause import Pause\n")
    copy.append("tests/passes/test_twins.py", TWIN)
    assert copy.edited == files_of_recipe("Add a pass", "pause")
    copy.test("tests/passes/test_twins.py", "-k", "pause")
    assert "pause" in copy.python("-c", "from n3c.compiler.cli.main import main; main()", "passes")


TABLE = '''
@dataclass(frozen=True, slots=True)
class Swiglu:
    """[swiglu]: a gated MLP (arXiv 2002.05202)."""

    intermediate_size: int = key("Inner width.", minimum=1, maximum=WIDTH)


SWIGLU = BlockKind(
    symbol="S",
    name="swiglu",
    title="SwiGLU",
    legend="gated MLP",
    class_name="SwiGLU",
    table="swiglu",
    table_class=Swiglu,
    lowering="n3c.passes.lower.blocks:swiglu",
    modules=(
        Module("swiglu.gate", "gate_proj"),
        Module("swiglu.up", "up_proj"),
        Module("swiglu.down", "down_proj"),
    ),
    hf_names=("swiglu",),
    config_keys=(ConfigKey("intermediate_size", "swiglu_intermediate_size", 11008),),
    in_transformers=False,
)


'''

LOWERING = """

def swiglu(block: Block, spec: Spec, x: Value) -> Value:
    \"\"\"Emit a gated MLP.\"\"\"
    m = spec.section("swiglu")
    h = block.norm(x, "norm.weight")
    gate = block.projection(h, "swiglu.gate", m.intermediate_size, "gate")
    up = block.projection(h, "swiglu.up", m.intermediate_size, "up")
    y = block.emit(ops.swiglu, gate, up, name="y")
    return block.projection(y, "swiglu.down", spec.model.hidden_size, "y")
"""

TEMPLATE = '''{# "S": the gated MLP. #}
{% macro config() %}
    swiglu_intermediate_size: int = {{ swiglu.intermediate_size }}  # inner width of a gated MLP
{% endmacro %}

{% macro module() %}
class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.swiglu_intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.swiglu_intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.swiglu_intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
{% endmacro %}

{% macro mixer() %}
    "S": SwiGLU,
{% endmacro %}

{% macro huggingface() %}
        "swiglu_intermediate_size": config.swiglu_intermediate_size,
{% endmacro %}

{% macro from_huggingface() %}
        swiglu_intermediate_size=config.swiglu_intermediate_size,
{% endmacro %}
'''

DRAWN = """def _swiglu(sizes: Sizes) -> st.SearchStrategy[Table]:
    return st.fixed_dictionaries({"intermediate_size": sizes})


"""

PARITY = '''"""The gated MLP: what is generated, evaluated and run by ONNX Runtime is transformers' LlamaMLP."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from n3c.backends.torch.emit import emit
from n3c.backends.torch.loading import load_package
from n3c.passes.lower.model import lower
from n3c.passes.serving import serve
from n3c.runtime.engines.reference.evaluate import evaluate
from n3c.specs.huggingface import export_config, import_config
from n3c.specs.json_places import parse_json
from support.drift import differences
from support.programs import random_tensors, save_tensors
from support.serving import RuntimeServed
from support.specs import spec_from_text

SPEC = """
schema = 1
name = "gated"
[model]
hidden_size = 48
vocab_size = 61
max_position_embeddings = 64
pattern = "SS"
[swiglu]
intermediate_size = 80
[serving]
max_seq_len = 32
"""


def llama_logits(tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Return the logits of two blocks x + LlamaMLP(norm(x)) between embedding and head."""

    def norm(x: Tensor, name: str) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], tensors[name].float(), 1e-5)

    x = tensors["backbone.embeddings.weight"].float()[ids]
    for layer in ("backbone.layers.0.", "backbone.layers.1."):
        mlp = LlamaMLP(LlamaConfig(hidden_size=48, intermediate_size=80, num_attention_heads=4))
        mixer = f"{layer}mixer."
        mlp.load_state_dict({k.removeprefix(mixer): v.float() for k, v in tensors.items() if k.startswith(mixer)})
        x = x + mlp(norm(x, f"{layer}norm.weight"))
    return norm(x, "backbone.norm_f.weight") @ tensors["lm_head.weight"].float().T


@torch.no_grad()
def test_parity(tmp_path: Path) -> None:
    spec, program = spec_from_text(SPEC), lower(spec_from_text(SPEC))
    checkpoint = save_tensors(random_tensors(program), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    ids = torch.tensor([[3], [60]])
    expected = llama_logits(tensors, ids)

    module = load_package(emit(spec, "0" * 64))
    model = module.Model()
    module.load_checkpoint(model, tmp_path)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)

    parameters = {name: tensors[name].float() for name in program.parameters}
    (reference,) = evaluate(program, "forward", {"input_ids": ids}, parameters).outputs
    torch.testing.assert_close(reference, expected, rtol=1e-5, atol=1e-5)

    served = RuntimeServed(serve(spec).program, checkpoint, batch=2)
    torch.testing.assert_close(served.call("decode", input_ids=ids)["logits"], expected, rtol=1e-5, atol=1e-5)


def test_lowering_and_template_agree(tmp_path: Path) -> None:
    assert differences(spec_from_text(SPEC), tmp_path) == []


def test_config_json_and_back() -> None:
    spec = spec_from_text(SPEC)
    config = export_config(spec)
    assert config["hybrid_override_pattern"] == "SS"
    assert "layers_block_type" not in config
    assert import_config(*parse_json(json.dumps(config), "config.json"), "x")[0] == spec
'''


def test_add_a_block_kind(copy: Copy) -> None:
    add_op(copy)
    copy.edited.clear()
    copy.insert("specs/blocks.py", "KINDS = (", TABLE.lstrip())
    copy.replace("specs/blocks.py", "ATTENTION, MLP)", "ATTENTION, MLP, SWIGLU)")
    copy.append("passes/lower/blocks.py", LOWERING)
    copy.create("backends/torch/templates/blocks/swiglu.jinja", TEMPLATE)
    copy.insert("tests/support/random_specs.py", "BLOCK_TABLES: ", DRAWN)
    copy.insert("tests/support/random_specs.py", "    MLP: _mlp,", "    SWIGLU: _swiglu,\n")
    copy.replace("tests/support/random_specs.py", "MLP, MOE\n", "MLP, MOE, SWIGLU\n")
    copy.create("tests/backends/torch/test_swiglu.py", PARITY)
    assert copy.edited == files_of_recipe("Add a block kind", "swiglu")
    tests = ("tests/backends/torch/test_swiglu.py", "tests/specs/test_blocks.py", "tests/specs/test_reference.py")
    copy.test(*tests)
    assert "## `[swiglu]`" in (copy.root / "docs/spec.md").read_text(encoding="utf-8")


def test_extend_from_outside() -> None:
    """The recipe names every file of the example, whose own tests `test_examples.py` runs, and every group."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## Extend n3c from outside\n")[2].partition("\n## ")[0]
    example = ROOT / "examples/gated-delta-net"
    package = example / "n3c_gated_delta_net"
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.*") if path.suffix in (".py", ".jinja")}
    named = {name.replace("NAME", "gated_delta_net") for name in re.findall(r"`([\w/.]+\.(?:py|jinja|toml))`", section)}
    assert named == (files - {"__init__.py"}) | {"pyproject.toml"}
    project = tomllib.loads((example / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(project["entry-points"]) == set(GROUPS) == set(re.findall(r"`(n3c\.[a-z]+)`", section))
