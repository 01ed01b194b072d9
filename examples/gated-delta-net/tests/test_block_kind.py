"""The block kind `G`: the generated module is transformers' Qwen3-Next, and every other form computes the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from models import HYBRID, SPEC, Qwen, checkpoint, generated, model_of, spec_of
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.sources import load
from n3c.backends.torch.emit import emit
from n3c.backends.torch.loading import write_files
from n3c.compiler import build, check, export_config, import_config, inspect, quantize
from n3c.ir.diagnostics import N3CError
from n3c.ir.source import tensor_names
from n3c.passes.lower.model import lower
from n3c.passes.serving import serve
from n3c.runtime import verify
from n3c.runtime.engines.reference.evaluate import evaluate, zero_states

GATED = Path(__file__).parents[1] / "gated.toml"
IDS = torch.randint(0, 97, (2, 70), generator=torch.Generator().manual_seed(1))
"""More tokens than a chunk of the rule, and no multiple of one."""


def test_logits_and_gradients_are_those_of_qwen3_next() -> None:
    model = model_of(generated(spec_of(SPEC)))
    qwen = Qwen(model)
    ours, theirs = model(IDS).logits, qwen(IDS)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    own = dict(model.named_parameters())
    assert own.keys() == qwen.by_name().keys()
    for name, parameter in qwen.by_name().items():
        gradient, expected = own[name].grad, parameter.grad
        assert expected is not None and expected.abs().max() > 0, name
        worst = (gradient - expected).abs().max() / expected.abs().max()
        assert worst < 1e-3, f"{name}: {worst}"


def test_generated_code_is_formatted_and_clean(tmp_path: Path) -> None:
    write_files(emit(spec_of(SPEC), "0" * 64), tmp_path)
    options = ["--isolated", "--no-cache", "--line-length", "100", str(tmp_path / "gated")]
    for command in (["format", "--check"], ["check", "--target-version", "py311", "--select", "E,F,I,UP,W"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@torch.no_grad()
def test_documents_are_as_alone() -> None:
    model = model_of(generated(spec_of(SPEC))).double()
    documents = torch.tensor([[0] * 5 + [1] * 61 + [2] * 4, [0] * 66 + [1] * 4])
    packed = model(IDS, document_ids=documents).logits
    for row, start, end in ((0, 0, 5), (0, 5, 66), (0, 66, 70), (1, 0, 66), (1, 66, 70)):
        alone = model(IDS[row : row + 1, start:end]).logits[0]
        torch.testing.assert_close(packed[row, start:end], alone, rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("text", [SPEC, HYBRID], ids=["gated", "hybrid"])
def test_token_by_token_is_the_whole_sequence(text: str) -> None:
    model = model_of(generated(spec_of(text))).double()
    whole, state = model(IDS).logits, model.allocate_state(2, 80)
    steps = [model.step(IDS[:, :3], state), *(model.step(IDS[:, t : t + 1], state) for t in range(3, 70))]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-6, atol=1e-6)


class Reference:
    """The reference evaluation of a spec's programs, on the weights of a checkpoint."""

    def __init__(self, text: str, folder: Path) -> None:
        spec = spec_of(text)
        self.module = generated(spec)
        self.checkpoint = Checkpoint(checkpoint(self.module, folder))
        self.training, self.serving = lower(spec), serve(spec).program

    def parameters(self, program: Any) -> dict[str, torch.Tensor]:
        return {
            name: torch.from_numpy(load(p, self.checkpoint).astype("float32")) for name, p in program.parameters.items()
        }

    def forward(self) -> torch.Tensor:
        return evaluate(self.training, "forward", {"input_ids": IDS}, self.parameters(self.training)).outputs[0]


@torch.no_grad()
@pytest.mark.parametrize("text", [SPEC, HYBRID], ids=["gated", "hybrid"])
def test_the_reference_evaluation(text: str, tmp_path: Path) -> None:
    reference = Reference(text, tmp_path)
    model = reference.module.Model()
    reference.module.load_checkpoint(model, tmp_path)
    torch.testing.assert_close(reference.forward(), model(IDS).logits, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_serving_continues_from_the_states_that_are_planned(tmp_path: Path) -> None:
    """A prompt in two chunks, of which the second is not full, and tokens one by one."""
    reference = Reference(SPEC, tmp_path)
    program, parameters = reference.serving, reference.parameters(reference.serving)
    kinds = {state.name.rpartition(".")[2]: (state.kind, state.type.dims) for state in program.states.values()}
    assert kinds == {"conv_state": ("conv", ("B", 192, 3)), "ssm_state": ("ssm", ("B", 4, 16, 32))}
    states, lengths, expected = zero_states(program, 2), torch.zeros(2, dtype=torch.int64), reference.forward()
    for start, counts in ((0, [40, 40]), (40, [20, 20])):
        ids = torch.nn.functional.pad(IDS, (0, 40))[:, start : start + 40]
        inputs = {"input_ids": ids, "counts": torch.tensor(counts), "lengths": lengths}
        result = evaluate(program, "prefill", inputs, parameters, states)
        states, lengths = result.states, lengths + torch.tensor(counts)
    torch.testing.assert_close(result.outputs[0][:, 0], expected[:, 59], rtol=1e-4, atol=1e-4)
    for token in range(60, 70):
        result = evaluate(program, "decode", {"input_ids": IDS[:, token : token + 1]}, parameters, states)
        states = result.states
        torch.testing.assert_close(result.outputs[0][:, 0], expected[:, token], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", [SPEC, HYBRID], ids=["gated", "hybrid"])
def test_onnx_runtime_computes_the_reference(text: str, tmp_path: Path) -> None:
    """`n3c verify` compares prefill, decode and, with a drafter, verify, layer by layer and state by state."""
    (tmp_path / "spec.toml").write_text(text, encoding="utf-8")
    weights = checkpoint(generated(spec_of(text)), tmp_path / "weights")
    build(tmp_path / "spec.toml", target="onnx", output=tmp_path / "out")
    verified = verify(tmp_path / "out", weights=weights)
    assert verified.as_json()["ok"], verified.as_json()


def test_its_name_chooses_the_blocks_that_are_computed_twice() -> None:
    model = model_of(generated(spec_of(HYBRID)))
    model.activation_checkpointing_enable(kinds="gated_delta_net")
    chosen = {type(block.mixer).__name__: block.gradient_checkpointing for block in model.backbone.layers}
    assert chosen.pop("GatedDeltaNet") and chosen and not any(chosen.values())


def test_no_card_says_that_transformers_has_it() -> None:
    card = emit(spec_of(SPEC), "0" * 64)["gated/training/card.py"]
    assert "library_name" not in card


def test_check_counts_and_refuses() -> None:
    layers = check(GATED, target="onnx").as_json()["layers"]
    assert layers == {"total": 8, "attention": 1, "mlp": 4, "gated_delta_net": 3}
    with pytest.raises(N3CError) as error:
        check(GATED, set=["gated_delta_net.num_value_heads=3", "gated_delta_net.key_heads=1"])
    said = {diagnostic.code: diagnostic for diagnostic in error.value.diagnostics}
    assert "`num_value_heads` 3 is not a multiple of `num_key_heads` 2" in said["E0218"].message
    assert said["E0102"].help == "did you mean `num_key_heads`?"
    assert said["E0102"].span is not None


def test_inspect_counts_parameters_and_state() -> None:
    """Of each block: in_proj_qkvz, in_proj_ba, convolution, out_proj, two vectors; the state of 4 x 16 x 32."""
    found: Any = inspect(GATED).as_json()
    roles = found["parameters"]["by_role"]
    assert roles["gated_delta_net.in_proj_qkvz"] == 3 * 64 * (2 * 32 + 2 * 128)
    assert roles["gated_delta_net.in_proj_ba"] == 3 * 64 * 8
    assert roles["gated_delta_net.conv1d"] == 3 * 192 * 4
    assert roles["gated_delta_net.out_proj"] == 3 * 64 * 128
    assert roles["gated_delta_net.decay"] == 3 * 8
    assert found["state"]["ssm_bytes_per_request"] == 3 * 4 * 16 * 32 * 4
    assert found["state"]["conv_bytes_per_request"] == 3 * 192 * 3 * 2
    formats = {row["role"]: row["format"] for row in found["ledger"]} if "ledger" in found else {}
    assert formats.get("gated_delta_net.in_proj_qkvz", "nvfp4") == "nvfp4"


def test_rules_decide_the_formats_of_its_roles(tmp_path: Path) -> None:
    package = generated(spec_of(GATED.read_text(encoding="utf-8")))
    quantize(GATED, weights=checkpoint(package, tmp_path / "bf16"), output=tmp_path / "nvfp4")
    quantized = set(Checkpoint(tmp_path / "nvfp4"))
    mixer = "backbone.layers.{}.mixer".format
    assert f"{mixer(0)}.in_proj_qkvz.weight_scale_2" in quantized
    assert f"{mixer(0)}.in_proj_ba.weight_scale" not in quantized
    assert f"{mixer(0)}.out_proj.weight_scale_2" in quantized
    assert f"{mixer(4)}.out_proj.weight_scale" in quantized
    assert f"{mixer(4)}.out_proj.weight_scale_2" not in quantized  # FP8: of the last four layers
    assert "library_name" not in (tmp_path / "nvfp4/README.md").read_text(encoding="utf-8")  # transformers has no `G`
    build(GATED, target="onnx", output=tmp_path / "out")
    verified = verify(tmp_path / "out", weights=tmp_path / "nvfp4")
    assert verified.as_json()["ok"], verified.as_json()


def test_config_json_and_back(tmp_path: Path) -> None:
    config = export_config(GATED, output=tmp_path / "config.json")
    del config
    imported = import_config(tmp_path / "config.json")
    assert imported.spec == spec_of(GATED.read_text(encoding="utf-8"))


def test_every_parameter_is_in_the_checkpoint(tmp_path: Path) -> None:
    reference = Reference(HYBRID, tmp_path)
    needed = {name for p in reference.training.parameters.values() for name in tensor_names(p.source)}
    assert needed == set(reference.checkpoint)
