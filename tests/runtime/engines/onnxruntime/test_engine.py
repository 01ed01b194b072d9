"""The engine of ONNX Runtime against `Model.step` of the generated code and against the state plan."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from n3c.backends.onnx.emit import emit_entry
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.torch.emit import emit
from n3c.backends.torch.loading import load_package
from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.passes.lower.model import lower
from n3c.passes.serving import Served, serve
from n3c.runtime.engines.interface import Array, call
from n3c.runtime.engines.onnxruntime.engine import OnnxRuntimeEngine
from n3c.runtime.engines.onnxruntime.open import cpu_engine
from n3c.runtime.engines.onnxruntime.session import inference_session
from n3c.runtime.generation.capacity import Capacity
from n3c.runtime.generation.drafter import MtpDrafter
from n3c.runtime.generation.loop import Generation
from n3c.runtime.generation.sequence import Options
from n3c.specs.schema import Spec
from support.programs import random_tensors, save_tensors
from support.specs import SMALL, spec_from_text


@dataclass
class Small:
    spec: Spec
    served: Served
    checkpoint: Checkpoint
    model: Any

    def engine(self, batch: int, *names: str) -> OnnxRuntimeEngine:
        return cpu_engine(
            self.served, self.spec, names or tuple(self.served.program.entry_points), batch, self.checkpoint
        )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("engine")
    text = SMALL.replace("max_seq_len = 32", "max_seq_len = 48\nprefill_chunk = 8\ndraft_tokens = 2")
    spec = spec_from_text(text.replace('"MEM*E-ME"', '"MEM*-E"'))
    served = serve(spec)
    checkpoint = save_tensors(random_tensors(lower(spec)), folder / "weights")
    module = load_package(emit(spec, "0" * 64))
    model = module.Model().eval()
    module.load_checkpoint(model, folder / "weights")
    return Small(spec, served, checkpoint, model)


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    state, tokens = model.allocate_state(1, 64), list[int]()
    logits = model.step(torch.tensor([prompt]), state)
    for _ in range(count):
        tokens.append(int(logits[0, -1].argmax()))
        logits = model.step(torch.tensor([tokens[-1:]]), state)
    return tokens


def test_greedy_generation_is_that_of_the_module(small: Small) -> None:
    """Ragged prompts of several chunks, with drafts and without, up to the context length."""
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, 97, size).tolist() for size in (19, 1, 8)]
    engine, capacity = small.engine(4), Capacity.of(small.spec)
    expected = [greedy(small.model, prompt, min(24, capacity.context_length - len(prompt))) for prompt in prompts]
    for drafter in (None, MtpDrafter()):
        generation = Generation(engine, prompts, Options(max_new_tokens=24), capacity, drafter=drafter)
        generation.run()
        assert [sequence.new for sequence in generation.sequences] == expected


def test_the_engine_allocates_what_the_state_plan_says(small: Small) -> None:
    """All states of this spec are float32, as in the float32 rendering."""
    plan = small.served.plan
    held = small.engine(3).allocated()
    assert held.states == 3 * sum(state.bytes for state in plan.states)
    assert held.spare_states == 3 * sum(state.bytes for state in plan.states if state.kind != "kv")
    assert plan.total_bytes == sum(-(-state.bytes // 256) * 256 for state in plan.states)


def test_an_idle_sequence_keeps_its_state_bit_for_bit(small: Small) -> None:
    engine = small.engine(2, "prefill", "decode")
    ids = np.random.default_rng(1).integers(0, 97, (2, 8))

    def prefill(counts: list[int], lengths: list[int]) -> None:
        call(engine, "prefill", input_ids=ids, following_ids=ids, counts=np.array(counts), lengths=np.array(lengths))

    prefill([5, 8], [0, 0])
    before = {name: state.copy() for name, state in engine.states.items()}
    prefill([0, 8], [5, 8])
    for name, state in engine.states.items():
        np.testing.assert_array_equal(state[0], before[name][0])
    assert any((state[1] != before[name][1]).any() for name, state in engine.states.items())


def test_a_state_read_one_token_late_changes_the_output(small: Small) -> None:
    """`accepted` and `lengths` matter: each off by one gives other logits in the next verification."""
    ids = np.random.default_rng(2).integers(0, 97, (1, 9))

    def logits(accepted: int, length: int) -> Array:
        engine = small.engine(1, "verify")
        for at, taken, behind in ((0, 0, 0), (3, accepted, length)):
            tokens = ids[:, at : at + 3]
            outputs = call(
                engine,
                "verify",
                input_ids=tokens,
                following_ids=np.pad(tokens[:, 1:], ((0, 0), (0, 1))),
                lengths=np.array([behind]),
                accepted=np.array([taken]),
            )
        return outputs["logits"]

    right = logits(3, 3)
    expected = small.model.step(torch.from_numpy(ids[:, :6]), small.model.allocate_state(1, 64)).numpy()[:, 3:]
    np.testing.assert_allclose(right, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    for accepted, length in ((2, 3), (3, 2), (2, 2)):
        assert np.abs(logits(accepted, length) - right).max() > 1e-2


def test_other_weights_in_the_same_engine(small: Small, tmp_path: Path) -> None:
    engine, capacity, options = small.engine(1), Capacity.of(small.spec), Options(max_new_tokens=8)

    def run(with_engine: OnnxRuntimeEngine) -> list[int]:
        generation = Generation(with_engine, [[1, 2, 3]], options, capacity, drafter=MtpDrafter())
        generation.run()
        return generation.sequences[0].new

    before = run(engine)
    other = save_tensors(random_tensors(lower(small.spec), seed=9), tmp_path)
    engine.replace_weights(other)
    fresh = cpu_engine(small.served, small.spec, tuple(small.served.program.entry_points), 1, other)
    assert run(engine) == run(fresh) != before
    engine.replace_weights(small.checkpoint)
    assert run(engine) == before


def test_telemetry_is_off_before_the_library_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)

    def session(model: bytes, options: Any, providers: list[str]) -> None:
        seen.append((model, providers))

    def fake_import(name: str) -> Any:
        seen.append((name, os.environ.get("ORT_DISABLE_TELEMETRY")))
        return SimpleNamespace(
            disable_telemetry_events=lambda: seen.append("disabled"),
            SessionOptions=SimpleNamespace,
            InferenceSession=session,
        )

    monkeypatch.setattr(importlib, "import_module", fake_import)
    inference_session(b"graph")
    assert seen == [("onnxruntime", "1"), "disabled", (b"graph", ["CPUExecutionProvider"])]


def test_a_graph_that_onnx_runtime_refuses(small: Small) -> None:
    entry = emit_entry(small.served.program, "decode", batch=1, rendering="float32")
    next(iter(entry.model.graph)).op_type = "Nonsense"
    with pytest.raises(N3CError, match="Nonsense") as error:
        OnnxRuntimeEngine([entry], small.checkpoint, capacity=48)
    assert (error.value.diagnostics[0].code, error.value.exit_code) == ("E0812", ExitCode.TARGET)
