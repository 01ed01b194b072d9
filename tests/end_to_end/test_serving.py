"""A prompt of 300 tokens in chunks, then 32 decoded tokens: every leg against transformers, in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import NemotronHConfig

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.torch.loading import load_package
from n3c.compiler.cli.main import run
from n3c.ir.program import Program
from n3c.passes.serving import serve
from n3c.specs.blocks import BY_SYMBOL
from n3c.specs.load import load_spec
from support.models import transformers_model
from support.programs import load_parameters
from support.serving import OnnxServed, RuntimeServed, Served

PROMPT, DECODED, CHUNK = 300, 32, 128
FLOAT32 = ["kv_cache_dtype", "ssm_state_dtype", "conv_state_dtype"]


@dataclass(frozen=True)
class Case:
    program: Program
    parameters: dict[str, Tensor]
    checkpoint: Checkpoint
    ids: Tensor
    expected: Tensor
    """Logits of transformers [1, PROMPT + DECODED, V]."""
    module: Any


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A tiny latent-MoE model without multi-token prediction, with weights that BF16 holds."""
    folder = tmp_path_factory.mktemp("serving")
    config = NemotronHConfig(
        vocab_size=97,
        hidden_size=64,
        layers_block_type=[BY_SYMBOL[symbol].hf_names[0] for symbol in "MEM*E"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=64,
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=48,
        moe_shared_expert_intermediate_size=80,
        moe_latent_size=32,
        routed_scaling_factor=2.5,
        initializer_range=0.1,
    )
    model = transformers_model(config, 0)
    ids = torch.randint(0, 97, (1, PROMPT + DECODED), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(tensor.bfloat16())
        expected = model(ids).logits
    model.save_pretrained(folder / "checkpoint")
    assert run(["import", str(folder / "checkpoint"), "-o", str(folder / "spec.toml")]) == 0
    assert run(["build", str(folder / "spec.toml"), "--target", "torch", "-o", str(folder / "out")]) == 0
    overrides = [f"serving.{key}=fp32" for key in FLOAT32]
    overrides += [
        "quantization.format=bf16",
        "quantization.rules=[]",
        f"serving.prefill_chunk={CHUNK}",
        "serving.max_seq_len=400",
    ]
    program = serve(load_spec(folder / "spec.toml", overrides)[0]).program
    assert set(program.entry_points) == {"prefill", "decode"}
    checkpoint = Checkpoint(folder / "checkpoint")
    module = load_package(folder / "out" / "torch")
    return Case(program, load_parameters(program, checkpoint), checkpoint, ids, expected, module)


def logits(served: Served, ids: Tensor) -> Tensor:
    """Return the logits of the last token of the prompt and of each decoded one, [1, 1 + DECODED, V]."""
    filled = torch.tensor([PROMPT])
    found = [served.prefill(ids[:, :PROMPT], filled, CHUNK)["logits"]]
    for t in range(PROMPT, PROMPT + DECODED):
        outputs = served.call("decode", input_ids=ids[:, t : t + 1], lengths=torch.tensor([t]))
        found += [outputs["logits"]]
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("leg", ["reference", "onnx runtime", "engine file"])
def test_prefill_and_decode(case: Case, leg: str) -> None:
    served: Served
    if leg == "onnx runtime":
        served = RuntimeServed(case.program, case.checkpoint, 1)
    else:
        served = (OnnxServed if leg == "engine file" else Served)(case.program, case.parameters, 1)
    actual = logits(served, case.ids)
    assert (actual - case.expected[:, PROMPT - 1 :]).abs().max() <= 1e-4


def test_the_generated_model_steps_alike(case: Case) -> None:
    model = case.module.Model(case.module.Config()).eval()
    case.module.load_checkpoint(model, case.checkpoint.directory)
    state = model.allocate_state(1, 400)
    prompt = case.ids[:, :PROMPT].split(CHUNK, dim=1)
    found = [model.step(piece, state)[:, -1:] for piece in prompt][-1:]
    found += [model.step(case.ids[:, t : t + 1], state) for t in range(PROMPT, PROMPT + DECODED)]
    assert (torch.cat(found, dim=1) - case.expected[:, PROMPT - 1 :]).abs().max() <= 1e-4
